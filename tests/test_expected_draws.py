"""Expected draws of samplers, and the exposures and scores that follow from them where no batch order is known."""

import itertools
import pickle
import warnings

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Step, inputs, mlp
from fits import QUIET
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_influence import Attributor, Influence, TracInCP, Trajectory
from lightning_influence.data.expected_draws import expected_draws
from lightning_influence.data.source import source_of

N = 7
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25]


class Shuffled(Sampler):
    """Every example once an epoch, by a generator of its own."""

    def __init__(self, n, generator=None):
        self.n, self.generator, self.epochs = n, generator, 0

    def __iter__(self):
        self.epochs += 1
        yield from torch.randperm(self.n, generator=self.generator).tolist()

    def __len__(self):
        return self.n


class Balanced(Sampler):
    """Batches with one example of each of two classes."""

    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        rare, often = (self.labels == 1).nonzero()[:, 0], (self.labels == 0).nonzero()[:, 0]
        for i in often[torch.randperm(len(often))].tolist():
            yield [i, int(rare[torch.randint(len(rare), ())])]

    def __len__(self):
        return int((self.labels == 0).sum())


def loader(n=N, **options):
    return DataLoader(TensorDataset(torch.zeros(n, 1)), **{"batch_size": 3, **options})


def uniform(draws):
    return draws is None


def test_samplers_that_draw_all_examples_alike_are_uniform():
    assert uniform(expected_draws(loader(shuffle=True)))
    assert uniform(expected_draws(loader(n=6)))  # in order, in batches of one size
    assert uniform(expected_draws(loader(sampler=Shuffled(N))))
    mine = Shuffled(N, torch.Generator().manual_seed(3))
    before = mine.generator.get_state()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert uniform(expected_draws(loader(sampler=mine)))
    assert mine.epochs == 0
    assert torch.equal(mine.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_with_replacement_are_the_shares():
    draws = expected_draws(loader(sampler=WeightedRandomSampler(WEIGHTS, 11)))
    share = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    torch.testing.assert_close(draws.share, share)
    torch.testing.assert_close(draws.per_epoch, share * 11)
    dropped = expected_draws(loader(sampler=WeightedRandomSampler(WEIGHTS, 11), drop_last=True))
    torch.testing.assert_close(dropped.per_epoch, share * 9)
    assert draws.note is None


def test_a_subset_never_draws_the_others():
    draws = expected_draws(loader(sampler=SubsetRandomSampler([1, 4, 6, 2])))
    torch.testing.assert_close(draws.share, torch.tensor([0, 1, 1, 0, 1, 0, 1]).double() / 4)
    torch.testing.assert_close(draws.per_epoch, torch.tensor([0, 1, 1, 0, 1, 0, 1]).double())


def test_random_draws_of_another_number_than_the_dataset_has():
    data = TensorDataset(torch.zeros(N, 1))
    draws = expected_draws(loader(sampler=RandomSampler(data, replacement=True, num_samples=14)))
    torch.testing.assert_close(draws.share, torch.full((N,), 1 / N, dtype=torch.float64))
    torch.testing.assert_close(draws.per_epoch, torch.full((N,), 2.0, dtype=torch.float64))


def test_a_loader_that_does_not_shuffle_is_uniform_and_says_so():
    draws = expected_draws(loader())
    torch.testing.assert_close(draws.share, torch.full((N,), 1 / N, dtype=torch.float64))
    assert "does not shuffle" in draws.note
    ordered = expected_draws(loader(sampler=[2, 0, 2]))
    torch.testing.assert_close(ordered.per_epoch, torch.tensor([1, 0, 2, 0, 0, 0, 0]).double())
    ragged = expected_draws(loader(sampler=list(range(N))))
    torch.testing.assert_close(ragged.share * 3, torch.tensor([1 / 3] * 6 + [1.0], dtype=torch.float64))


def test_weights_without_replacement_are_estimated_and_say_so():
    weights = [0.5, 2.0, 1.0, 3.0]
    expected = torch.zeros(4, dtype=torch.float64)
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        expected[[first, second]] += chance
    draws = expected_draws(loader(4, sampler=WeightedRandomSampler(weights, 2, replacement=False), batch_size=1))
    torch.testing.assert_close(draws.per_epoch, expected, rtol=0, atol=0.1)
    assert "`WeightedRandomSampler` draws an example was estimated from 200 of its epochs" in draws.note


def test_batch_samplers_of_others_are_drawn_from():
    labels = torch.tensor([0, 1, 0, 0, 0, 0, 1])
    draws = expected_draws(loader(batch_sampler=Balanced(labels), batch_size=1))
    expected = torch.where(labels == 1, 1 / 4, 1 / 10).double()
    torch.testing.assert_close(draws.share, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(draws.share[labels == 0], expected[labels == 0])
    assert "`Balanced`" in draws.note
    fixed = expected_draws(loader(batch_sampler=[[0, 1], [2]], batch_size=1))
    torch.testing.assert_close(fixed.share, torch.tensor([1, 1, 2, 0, 0, 0, 0]).double() / 4)
    assert fixed.note is None


def test_a_sampler_that_fails_is_noted():
    class Broken(BatchSampler):
        def __iter__(self):
            raise RuntimeError("closed")

    draws = expected_draws(loader(batch_sampler=Broken(range(N), 2, False), batch_size=1))
    assert "`Broken` could not be drawn from" in draws.note


def test_a_source_goes_to_other_processes_without_its_loader():
    source = source_of(loader(shuffle=True, generator=torch.Generator()), "train")
    assert pickle.loads(pickle.dumps(source)).batches == 3


# ---- scores from .ckpt files ----------------------------------------------------------------------------------------


def files(module, train, folder, epochs=2, **options):
    """One Lightning checkpoint an epoch."""
    checkpoints = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=[checkpoints], default_root_dir=folder
    )
    trainer.fit(module, train)
    return sorted(folder.glob("*.ckpt"))


@pytest.mark.parametrize("summed", [False, True])
def test_scores_from_files_follow_the_weights_of_the_sampler(tmp_path, summed):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(reduction="sum" if summed else "mean")
    module, data, queries = Step(mlp(), loss).double(), inputs(5, n=N)(), inputs(5, n=3, seed=2)()
    train = DataLoader(data, 3, sampler=WeightedRandomSampler(WEIGHTS, 9))
    found = files(module, train, tmp_path)
    trajectory = Trajectory.from_checkpoints(found, learning_rates=[0.05, 0.025])
    scores = Attributor(module, train, trajectory).score(TracInCP(), queries)
    share = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    each = 9 * share if summed else 3 * share  # of an epoch of three batches of three
    windows = [
        (torch.load(path, weights_only=True)["state_dict"], rate * each[None])
        for path, rate in zip(found, (0.05, 0.025), strict=True)
    ]
    ones, asked = ([default_collate([item]) for item in d] for d in (data, queries))
    names = [name for name, _ in module.named_parameters()]
    oracles.assert_scores(scores.values, oracles.tracin(module, ones, asked, names, windows), 1e-10)


class TwoOptimizers(pl.LightningModule):
    """Both halves of a network are trained, one every so many batches."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.every, self.net, self.seen = every, mlp(), []

    def training_step(self, batch, batch_idx):
        for k, optimizer in enumerate(self.optimizers()):
            if k == 0 or batch_idx % self.every == 0:
                optimizer.zero_grad()
                self.manual_backward(joint(self, batch).mean())
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[k].parameters(), lr=rate) for k, rate in ((0, 0.1), (2, 0.1))]


def joint(module, batch):
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def test_the_steps_of_two_optimizers_in_files_are_counted_once_each(tmp_path):
    torch.manual_seed(0)
    module, data = TwoOptimizers().double(), inputs(5, n=6)()
    train = DataLoader(data, 3, shuffle=True)
    found = files(module, train, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trajectory = Trajectory.from_checkpoints(found)
    for index in range(2):
        torch.testing.assert_close(
            trajectory.exposure(index, "mean", 6), torch.full((1, 6), 0.1 * 2 / 6, dtype=torch.float64)
        )
    assert any("one step in each batch" in note for note in trajectory.notes)
    scores = Attributor(module, train, trajectory, loss=joint).score(TracInCP(), inputs(5, n=2)())
    assert scores.units.startswith("loss")


def test_units_are_arbitrary_where_optimizers_made_unequally_many_steps(tmp_path):
    torch.manual_seed(0)
    module, data = TwoOptimizers(every=2).double(), inputs(5, n=6)()
    train = DataLoader(data, 2, shuffle=True)
    trajectory = Trajectory.from_checkpoints(files(module, train, tmp_path), learning_rates=0.1)
    scores = Attributor(module, train, trajectory, loss=joint).score(TracInCP(), inputs(5, n=2)())
    assert scores.units == "arbitrary"
    assert any("steps of 2 optimizers together" in note for note in scores.notes)


def test_captured_steps_of_two_optimizers_count_for_their_own_parameters(tmp_path):
    torch.manual_seed(0)
    module, data = TwoOptimizers(every=2).double(), inputs(5, n=6)()
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[Influence(dirpath=tmp_path)])
    trainer.fit(module, DataLoader(data, 2))
    trajectory = Trajectory.load(tmp_path)
    groups, exposure = trajectory.parameter_groups, trajectory.exposure(-1, "mean", 6)
    torch.testing.assert_close(exposure[groups["net.0.weight"]], torch.full((6,), 0.05, dtype=torch.float64))
    expected = torch.tensor([0.05, 0.05, 0, 0, 0.05, 0.05], dtype=torch.float64)
    torch.testing.assert_close(exposure[groups["net.2.weight"]], expected)
