"""Steps that fail on a batch of one, and refusals that name their cause."""

import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, drawn, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import (
    EKFAC,
    Attributor,
    ExactHessian,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    RepresenterPoints,
    TracIn,
    TracInCP,
    Trajectory,
)


def pairs(n, seed=1, target="binary"):
    g = drawn(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = torch.randint(2, (n,), generator=g)
    return Items(list(zip(x, y.double() if target == "binary" else y, strict=True)))


class Squeezing(Step):
    """Drops every dimension of size one, or (the same network) the last one only."""

    def __init__(self, everything, reduction="mean"):
        super().__init__(mlp(classes=1))
        self.everything, self.reduction = everything, reduction

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        out = out.squeeze() if self.everything else out.squeeze(1)
        return F.binary_cross_entropy_with_logits(out, y, reduction=self.reduction)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fitted(folder, everything, reduction="mean", n=12):
    torch.manual_seed(0)
    module = Squeezing(everything, reduction).double()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[Influence(dirpath=str(folder))], **options)
    loader = DataLoader(pairs(n), 3, shuffle=False)
    trainer.fit(module, loader)
    return module, loader, Trajectory.load(folder)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "method",
    [
        GradientDot(),
        TracInCP(),
        TracIn(),
        HyDRA(),
        InfluenceFunction(ExactHessian(damping=0.1)),
        InfluenceFunction(EKFAC(damping=0.1)),
        RepresenterPoints(),
        KNNShapley(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_step_that_squeezes_its_batch_of_one_is_scored_as_if_it_did_not(tmp_path, method, reduction):
    # 13 queries in blocks of 4 and 3 leave blocks of one.
    found = []
    for everything in (True, False):
        module, loader, trajectory = fitted(tmp_path / str(everything), everything, reduction)
        attributor = Attributor(module, loader, trajectory, batch_size=4)
        scores = attributor.score(method, pairs(13, 2))
        found.append(scores.values)
        if not isinstance(method, (RepresenterPoints, KNNShapley)):  # they plan no gradients
            assert everything == any("two copies of an example" in note for note in scores.notes)
    assert float((found[0] - found[1]).abs().max()) <= 1e-9 * float(found[1].abs().max())
    assert float(found[1].abs().max()) > 0


@pytest.mark.parametrize("batch_size", [1, 3, 5, None])
def test_any_block_size_and_a_single_query_or_example_will_do(batch_size):
    torch.manual_seed(0)
    module, plain = Squeezing(True).double(), Squeezing(False).double()
    plain.load_state_dict(module.state_dict())
    for n, n_queries in ((7, 1), (1, 4), (6, 4)):
        values = [
            Attributor(m, pairs(n), None, batch_size=batch_size).score(GradientDot(), pairs(n_queries, 2)).values
            for m in (module, plain)
        ]
        assert torch.allclose(*values, rtol=1e-10, atol=1e-14)
    attributor = Attributor(module, pairs(7), None, batch_size=batch_size)
    alone = Attributor(plain, pairs(7), None).losses().values
    assert torch.allclose(attributor.losses().values, alone, rtol=1e-12)
    own = attributor.self_influence(GradientDot()).values
    assert torch.allclose(own, Attributor(plain, pairs(7), None).self_influence(GradientDot()).values, rtol=1e-10)


def test_per_sample_losses_that_squeeze_too():
    torch.manual_seed(0)
    module = Squeezing(True).double()

    def squeezed(module, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(module.net(x).squeeze(), y, reduction="none")

    def kept(module, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(module.net(x).squeeze(1), y, reduction="none")

    values = [
        Attributor(module, pairs(7), None, loss=f).score(GradientDot(), pairs(4, 2)).values for f in (squeezed, kept)
    ]
    assert torch.allclose(*values, rtol=1e-10)


def test_workers_read_blocks_of_one_as_well():
    torch.manual_seed(0)
    module, plain = Squeezing(True).double(), Squeezing(False).double()
    plain.load_state_dict(module.state_dict())
    values = [
        Attributor(m, DataLoader(pairs(7), 3, num_workers=1), None, batch_size=3)
        .score(GradientDot(), pairs(4, 2))
        .values
        for m in (module, plain)
    ]
    assert torch.allclose(*values, rtol=1e-10)


def test_copies_are_not_taken_where_batches_of_two_fail_as_well():
    class Broken(Step):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("something of the user's")

    with pytest.raises(
        ValueError, match=r"to run in eval mode .* RuntimeError: something of the user's\. Pass `loss=`"
    ):
        Attributor(Broken(mlp()), pairs(6), None).score(GradientDot(), pairs(2))


class Detector(Step):
    """Returns its losses in train mode and a list of predictions in eval mode, as detectors do."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        return F.cross_entropy(out, y) if self.training else [{"boxes": row} for row in out]


def test_a_step_for_train_mode_only_is_refused_with_its_way_out():
    module, data = Detector().double(), pairs(6, target="class")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(TypeError, match=r"in eval mode.* a loss in train mode only; .*got list\. Pass `loss=`"):
        Attributor(module, data, None).score(GradientDot(), data)
    assert not any(m.training != module.training for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def loss(module, batch):
        x, y = batch
        module.train()
        module.net[1].eval()
        assert module.training
        return F.cross_entropy(module.net(x), y, reduction="none")

    assert Attributor(module, data, None, loss=loss).score(GradientDot(), data).values.abs().max() > 0


class OneRowFails(Detector):
    """Fails in eval mode on one example only, which the few that are tried in train mode are not."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not self.training and bool((y == 7).any()):
            raise OSError("cannot read file 7")
        return F.mse_loss(self.net(x)[:, 0], y)


def test_an_error_of_one_example_is_not_taken_for_a_step_that_works_in_train_mode_only():
    x = torch.arange(24 * 5, dtype=torch.float64).reshape(24, 5) % 7
    data = TensorDataset(x, torch.arange(24, dtype=torch.float64))
    with pytest.raises(ValueError, match="got OSError: cannot read file 7"):
        Attributor(OneRowFails().double(), data, None).score(GradientDot(), data)


@pytest.mark.parametrize(
    ("loss", "operation"),
    [
        (F.mse_loss, "mse_loss"),
        (F.l1_loss, "l1_loss"),
        (F.smooth_l1_loss, "smooth_l1_loss"),
        (lambda out, y: (out - y).pow(2).mean(), "sub"),
        (lambda out, y: (y - out).abs().mean(), "sub"),
        (lambda out, y: torch.mean((y * out - 1).pow(2)), "mul"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting_over_pairs_of_examples_is_named(loss, operation):
    torch.manual_seed(0)
    module = Step(mlp(classes=1), loss).double()
    with pytest.raises(ValueError, match=rf"`{operation}` was given tensors of shapes \(5,.*broadcasts to pairs"):
        Attributor(module, pairs(12), None).score(GradientDot(), pairs(4, 2))


def _mixup(items):
    x, y = default_collate(items)
    mixed = torch.rand(1, dtype=x.dtype)
    return mixed * x + (1 - mixed) * x[torch.randperm(len(x))], y


def _cutmix(items):
    x, y = default_collate(items)
    x[:, :2] = x.flip(0)[:, :2]
    return x, y


def _masked(items):
    x, y = default_collate(items)
    return x.masked_fill(torch.rand(x.shape) < 0.3, 0), y


def _centred(items):
    x, y = default_collate(items)
    return x - x.mean(0), y


@pytest.mark.parametrize("collate", [_mixup, _cutmix, _masked, _centred])
def test_a_collate_function_that_mixes_or_draws_is_named(collate):
    module = Step(mlp(classes=2)).double()
    loader = DataLoader(pairs(12, target="class"), 4, collate_fn=collate)
    cause = "draws random numbers" if collate in (_mixup, _masked) else "changes an example by the others in its batch"
    with pytest.raises(ValueError, match=rf"`collate_fn`.*{cause}.*only stacks"):
        Attributor(module, loader, None).score(GradientDot(), pairs(4, 2, "class"))


def test_a_mixing_collate_function_is_refused_though_the_losses_hardly_tell():
    # A loss that is linear in its inputs: that of mixed examples is the mean of theirs.
    module = Step(nn.Linear(5, 1).double(), lambda out, y: (out[:, 0] * 1e-3).mean()).double()
    loader = DataLoader(pairs(12), 4, collate_fn=_mixup)
    with pytest.raises(ValueError, match="draws random numbers"):
        Attributor(module, loader, None).score(GradientDot(), pairs(4, 2))


def sampled(out, y):
    return F.cross_entropy(torch.distributions.Normal(out, 1.0).rsample(), y)


@pytest.mark.parametrize("loss", [lambda out, y: F.cross_entropy(F.dropout(out, 0.5), y), sampled])
def test_random_numbers_in_eval_mode_are_named(loss):
    module = Step(mlp(classes=2), loss).double()
    cause = r"random numbers in eval mode, such as a functional .* sample of a VAE \(`randn_like`, `rsample`\)"
    with pytest.raises(ValueError, match=cause):
        Attributor(module, pairs(12, target="class"), None).score(GradientDot(), pairs(4, 2, "class"))


def test_a_summed_loss_of_ckpt_files_asks_for_what_can_be_passed(tmp_path):
    module, loader, _ = fitted(tmp_path, False, "sum")
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trajectory = Trajectory.from_checkpoints([tmp_path / "one.ckpt"], learning_rates=0.05)
    with pytest.raises(ValueError, match=r"Pass the training DataLoader as `Attributor\(train=\)`"):
        Attributor(module, pairs(12), trajectory).score(TracInCP(), pairs(4, 2))
    assert Attributor(module, loader, trajectory).score(TracInCP(), pairs(4, 2)).values.abs().max() > 0
