"""Fixed seeds: the captured run once more with weights 0, against a loop over its steps written out by hand."""

import oracles_retraining as oracles
import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, Downsampling, Influence, LeaveOneOut, Refit
from lightning_influence.replay.replay import DriftError
from refit.ridge import DECAY, Ridge, data

TEST = data(3, seed=1)


class Net(pl.LightningModule):
    """A small network under SGD with momentum and weight decay, a step of the learning rate between the epochs."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.8, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def captured(folder, module, train, epochs=2, **options):
    torch.manual_seed(0)
    model, influence = module(), Influence(dirpath=folder)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[influence], **options)
    trainer.fit(model, DataLoader(train, batch_size=5, shuffle=True))
    return model, influence.attributor.trajectory


def asked(folder, module=Net, train=None, **options):
    train = data(13, classes=True) if train is None else train
    model, trajectory = captured(folder, module, train)
    refit = Refit(**options)
    return Attributor(model, train=train, trajectory=trajectory, refit=refit), refit


def trained_by_hand(trajectory, train, mask, renormalize=False):
    """The final weights by a loop over the captured steps, the gradient of each by autograd."""
    module, (x, y) = Net(), train.tensors
    start = trajectory.checkpoints[0].load().parameters
    module.load_state_dict({name: start[name] for name in module.state_dict()})
    speed = [torch.zeros_like(p) for p in module.parameters()]
    for step, (ids, lr) in enumerate(
        zip(trajectory.steps["ids"].to_pylist(), trajectory.steps["lr"].to_pylist(), strict=True)
    ):
        (batch,) = ids
        weights = mask[batch].double()
        each = F.cross_entropy(module.net(x[batch]), y[batch], reduction="none")
        divisor = weights.sum() if renormalize else len(batch)
        loss = (each * weights).sum() / divisor if weights.any() else (each * 0).sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient, v in zip(module.parameters(), gradients, speed, strict=True):
                v.copy_(gradient + 0.01 * parameter if step == 0 else 0.8 * v + gradient + 0.01 * parameter)
                parameter.sub_(lr[0] * v)
    return module


def losses_by_hand(module, asked):
    with torch.no_grad():
        return F.cross_entropy(module.net(asked.tensors[0]), asked.tensors[1], reduction="none")


@pytest.mark.parametrize("removal", ["downweight", "renormalize"])
def test_models_are_the_captured_run_without_some_examples(tmp_path, removal):
    train, queries = data(13, classes=True), data(4, seed=2, classes=True)
    asker, refit = asked(tmp_path, train=train, removal=removal)
    bank = refit.bank(queries, n_subsets=6, n_seeds=3)
    assert bank.losses.shape == (6, 1, 4)  # a seed makes no difference
    for row, found in zip(bank.membership, bank.mean, strict=True):
        by_hand = trained_by_hand(asker.trajectory, train, row, removal == "renormalize")
        torch.testing.assert_close(found, losses_by_hand(by_hand, queries), rtol=0, atol=1e-12)
    everything = losses_by_hand(trained_by_hand(asker.trajectory, train, torch.ones(13)), queries)
    torch.testing.assert_close(bank.full[0], everything, rtol=0, atol=1e-12)
    assert bank.deterministic


def test_leave_one_out_needs_no_factories_and_leaves_the_module_alone(tmp_path):
    train, queries = data(13, classes=True), data(4, seed=2, classes=True)
    asker, _ = asked(tmp_path, train=train)
    before = {name: value.clone() for name, value in asker.module.state_dict().items()}
    scores = asker.score(LeaveOneOut(), queries)

    def losses_on(ids):
        mask = torch.zeros(13)
        mask[list(ids)] = 1
        return losses_by_hand(trained_by_hand(asker.trajectory, train, mask), queries)

    torch.testing.assert_close(scores.values, oracles.leave_one_out(losses_on, 13), rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in asker.module.state_dict().items())
    assert asker.refit.models.store.folder == asker.trajectory.path / "refit-fixed"


@pytest.mark.slow
def test_run_to_the_end_leave_one_out_is_that_of_normal_equations(tmp_path):
    """Full batches until nothing moves: the optimum with the whole set's divisor."""
    train = data(12)
    torch.manual_seed(0)
    model, influence = Ridge(), Influence(dirpath=tmp_path, every_n_epochs=300)
    trainer = pl.Trainer(**QUIET, max_epochs=300, callbacks=[influence])
    trainer.fit(model, DataLoader(train, batch_size=12))
    asker = Attributor(model, train=train, trajectory=influence.attributor.trajectory, refit=Refit())
    scores = asker.score(LeaveOneOut(), TEST)

    def losses_on(ids):
        return oracles.ridge_losses(*train.tensors, ids, *TEST.tensors, DECAY, 12)

    torch.testing.assert_close(scores.values, oracles.leave_one_out(losses_on, 12), rtol=0, atol=1e-9)


def test_a_bank_of_another_run_is_refused(tmp_path):
    train = data(13, classes=True)
    first, _ = asked(tmp_path / "a", train=train, dirpath=tmp_path / "bank")
    first.score(Downsampling(3), train)
    model, trajectory = captured(tmp_path / "b", Net, train, epochs=1)
    other = Attributor(model, train=train, trajectory=trajectory, refit=Refit(dirpath=tmp_path / "bank"))
    with pytest.raises(ValueError, match="bank of models with `run`"):
        other.score(Downsampling(3), train)
    renormalized, _ = asked(tmp_path / "a", train=train, dirpath=tmp_path / "bank", removal="renormalize")
    with pytest.raises(ValueError, match="bank of models with `removal` 'renormalize'"):
        renormalized.score(Downsampling(3), train)


def test_a_run_that_cannot_be_repeated_is_refused(tmp_path):
    train = data(13, classes=True)
    model, trajectory = captured(tmp_path, Net, train)
    x, y = train.tensors
    other = torch.utils.data.TensorDataset(-3 * x, y)
    asker = Attributor(model, train=other, trajectory=trajectory, refit=Refit(), check_data=False)
    with pytest.raises(DriftError, match="steps that are repeated from the record to end at the fit's"):
        asker.score(Downsampling(3), train)


def test_models_that_diverge_are_named(tmp_path):
    asker, _ = asked(tmp_path)
    asker.score(LeaveOneOut(examples=(0,)), TEST_CLASSES)
    way = asker.refit.models.backend
    from lightning_influence.refit import fixed

    def broken(replay, weights, renormalize, done):
        found = run_many(replay, weights, renormalize, done)
        found["net.0.bias"][0] = torch.nan
        return found

    run_many, fixed.run_many = fixed.run_many, broken
    try:
        with pytest.warns(UserWarning, match=r"without \[3\].*NaN or infinity in `net.0.bias`"):
            scores = asker.score(LeaveOneOut(examples=(3, 4)), TEST_CLASSES)
    finally:
        fixed.run_many = run_many
    assert scores.values.isnan().all(0).tolist() == [True, False]
    assert not way.seeded


TEST_CLASSES = data(4, seed=2, classes=True)
