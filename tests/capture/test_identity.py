"""The indices of every step are those that the batch itself names, and training does not notice the guest."""

import contextlib
import pickle

import pytest
import pytorch_lightning as pl
import torch
from fits import Indexed, Net, OddFirst, Stream, fit, loader, recorded, seeded
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, RandomSampler, Subset, WeightedRandomSampler

from lightning_influence.callback.influence import Influence


def run(tmp_path, make_loader, module=None, **options):
    """Fit with and without the callback; both must be the same run, and the record must be what was seen."""
    module = module or {}
    influence = Influence(dirpath=tmp_path, **options.pop("influence", {}))
    watched, plain = seeded(Net, **module), seeded(Net, **module)
    fit(watched, make_loader(), influence, **options)
    fit(plain, make_loader(), **options)
    assert watched.seen == plain.seen
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    return influence.trajectory, watched.seen


def used(**options):
    """Persistent workers that the user already started."""
    made = loader(num_workers=2, persistent_workers=True, **options)
    list(made)
    return made


LOADERS = {
    "shuffled": loader,
    "drop_last": lambda **o: loader(drop_last=True, **o),
    "sampler": lambda **o: loader(shuffle=None, sampler=WeightedRandomSampler(torch.ones(23), 30), **o),
    "batch_sampler": lambda **o: DataLoader(Indexed(), batch_sampler=OddFirst(RandomSampler(range(23)), 4, False), **o),
    "no_batches": lambda **o: loader(batch_size=None, **o),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_indices_are_those_of_the_batch(name, workers, tmp_path):
    trajectory, seen = run(tmp_path, lambda: LOADERS[name](num_workers=workers))
    assert recorded(trajectory) == seen
    assert trajectory.dataset_size == 23
    assert trajectory.has_batch_order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_indices_are_right_when_the_trainer_cuts_and_reloads(options, workers, tmp_path):
    trajectory, seen = run(tmp_path, lambda: loader(num_workers=workers), max_epochs=3, **options)
    assert recorded(trajectory) == seen


def test_indices_are_right_when_an_epoch_is_left_early(tmp_path):
    trajectory, seen = run(tmp_path, loader, module={"stop_at": 3})
    assert recorded(trajectory) == seen


@pytest.mark.parametrize("make", [lambda: loader(num_workers=2, persistent_workers=True), used], ids=["new", "used"])
def test_indices_are_right_with_persistent_workers(make, tmp_path):
    trajectory, seen = run(tmp_path, make, max_epochs=3)
    assert recorded(trajectory) == seen


def test_a_users_own_loop_over_the_loader_is_not_training(tmp_path):
    class Nosy(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                list(self.trainer.train_dataloader)

        def on_train_epoch_end(self):
            list(self.trainer.train_dataloader)

    influence = Influence(dirpath=tmp_path)
    module = seeded(Nosy)
    fit(module, loader(), influence, max_epochs=3)
    assert recorded(influence.trajectory) == module.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_gives_ids_through_sample_id(workers, tmp_path):
    for sample_id in ("idx", lambda batch: batch["idx"]):
        options = {"influence": {"sample_id": sample_id}}
        trajectory, seen = run(tmp_path, lambda: DataLoader(Stream(), 4, num_workers=workers), **options)
        assert recorded(trajectory) == seen
        assert trajectory.dataset_size is None


class Generated(DataLoader):
    """A loader that holds one batch back, as user code may."""

    def __iter__(self):
        iterator = super().__iter__()
        held = next(iterator)
        for batch in iterator:
            yield held
            held = batch
        yield held


class Batches:
    """A loader that is none of torch's."""

    def __iter__(self):
        return iter(loader())

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(), 4),
        lambda: Generated(Indexed(), 4),
        lambda: loader(num_workers=2, in_order=False),
        Batches,
    ],
    ids=["iterable", "generator", "in_order", "foreign"],
)
def test_unknown_identity_is_said_once_and_recorded_as_unknown(make, tmp_path):
    influence = Influence(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="does not know which examples") as caught:
        fit(seeded(Net), make(), influence)
    assert sum("does not know which examples" in str(w.message) for w in caught) == 1
    trajectory = influence.trajectory
    assert not trajectory.has_batch_order
    assert trajectory.steps["ids"].null_count == len(trajectory.steps) == 12
    assert any("sample_id=" in note for note in trajectory.notes)


def test_a_wrong_sample_id_is_said_and_training_goes_on(tmp_path):
    influence = Influence(dirpath=tmp_path, sample_id="absent")
    with pytest.warns(UserWarning, match="Expected `sample_id='absent'`"):
        fit(seeded(Net), loader(), influence)
    assert not influence.trajectory.has_batch_order


def test_keys_that_are_no_integers_are_unknown(tmp_path):
    class Keyed(Indexed):
        def __getitem__(self, key):
            return super().__getitem__(key[1])

    influence = Influence(dirpath=tmp_path)
    keyed = DataLoader(Keyed(), 4, sampler=[("a", i) for i in range(23)])
    with pytest.warns(UserWarning, match="keys that are not integers"):
        fit(seeded(Net), keyed, influence)


class Two(Net):
    def training_step(self, batch, batch_idx):
        parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
        self.seen.append([part["idx"].tolist() for part in parts])
        return sum(self.loss(part) for part in parts)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_combined_loaders_are_recorded_apart(mode, workers, tmp_path):
    def make():
        few, many = loader(Indexed(7), 2, num_workers=workers), loader(num_workers=workers)
        return CombinedLoader({"a": few, "b": many}, mode)

    influence, module = Influence(dirpath=tmp_path), seeded(Two)
    fit(module, make(), influence)
    rows = influence.trajectory.steps["loader_ids"].to_pylist()
    assert [[ids for ids in micro if ids] for row in rows for micro in row] == module.seen
    assert any("2 loaders" in note for note in influence.trajectory.notes)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_callbacks_share_one_tap(workers, tmp_path):
    first, second = Influence(dirpath=tmp_path / "a"), Influence(dirpath=tmp_path / "b", every_n_train_steps=2)
    module = seeded(Net)
    fit(module, loader(num_workers=workers), first, second)
    assert recorded(first.trajectory) == recorded(second.trajectory) == module.seen


def test_indices_are_into_the_dataset_of_the_loader(tmp_path):
    trajectory, _ = run(tmp_path, lambda: loader(Subset(Indexed(), range(10, 20))))
    assert sorted(i for micro in recorded(trajectory) for i in micro) == sorted([*range(10)] * 2)


def test_a_loader_is_itself_again_and_pickles_as_itself(tmp_path):
    kinds = []

    class Look(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            kinds.append(type(pickle.loads(pickle.dumps(self.trainer.train_dataloader))))

    made = loader(num_workers=0)
    before = dict(vars(made))
    trainer = fit(seeded(Look), made, Influence(dirpath=tmp_path))
    assert type(made) is DataLoader
    assert vars(made) == before
    assert set(kinds) == {DataLoader}
    assert "process_dataloader" not in vars(trainer.strategy)


class Reloads(pl.LightningDataModule):
    """Makes its training data again for every epoch."""

    def __init__(self, make):
        super().__init__()
        self.make, self.epoch = make, 0

    def train_dataloader(self):
        self.epoch += 1
        return loader(self.make(self.epoch))


@pytest.mark.parametrize(
    ("make", "text", "warns"),
    [
        (
            lambda epoch: Subset(Indexed(), range(epoch, epoch + 8)),
            "a `Subset` with other indices: one id means several",
            True,
        ),
        (lambda epoch: Indexed(7 + epoch), "a dataset of 9 examples instead of 8: one id means several", True),
        (
            lambda epoch: Indexed(8),
            "another Indexed of the same length: its examples are assumed to be the same",
            False,
        ),
    ],
)
def test_data_made_again_for_an_epoch_are_compared(make, text, warns, tmp_path):
    influence = Influence(dirpath=tmp_path)
    with pytest.warns(UserWarning, match=text) if warns else contextlib.nullcontext():
        fit(seeded(Net), Reloads(make), influence, reload_dataloaders_every_n_epochs=1)
    assert sum(text in note for note in influence.trajectory.notes) == 1
