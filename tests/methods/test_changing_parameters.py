"""Parameters that are frozen, thawed, added or moved to another group on the way count where they were trained."""

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Step, mlp
from fits import QUIET
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import Attributor, Influence, TracInCP, Trajectory

FIRST = {"net.0.weight", "net.0.bias"}
ALL = FIRST | {"net.2.weight", "net.2.bias"}


class OneGroup(Step):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class TwoGroups(Step):
    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.05}, {"params": self.net[2].parameters(), "lr": 0.2}]
        return torch.optim.SGD(groups, lr=0.1)


class Freezes(pl.Callback):
    """The first layer trains in one of two epochs, and stays in its optimizer all the time."""

    def __init__(self, trains_in):
        self.trains_in = trains_in

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch == self.trains_in)


class Finetunes(pl.callbacks.BaseFinetuning):
    """Lightning's own: the first layer joins in the second epoch, with a learning rate of its own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Moves(pl.Callback):
    """The first weight changes its group for the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            slow, fast = trainer.optimizers[0].param_groups
            fast["params"].append(slow["params"].pop(0))


CASES = {
    "thawed": (OneGroup, Freezes(1), [dict.fromkeys(ALL - FIRST, 0.05), dict.fromkeys(ALL, 0.05)]),
    "frozen": (OneGroup, Freezes(0), [dict.fromkeys(ALL, 0.05), dict.fromkeys(ALL - FIRST, 0.05)]),
    "added": (
        OneGroup,
        Finetunes(),
        [dict.fromkeys(ALL - FIRST, 0.05), dict.fromkeys(ALL - FIRST, 0.05) | dict.fromkeys(FIRST, 0.01)],
    ),
    "moved": (
        TwoGroups,
        Moves(),
        [
            dict.fromkeys(FIRST, 0.05) | dict.fromkeys(ALL - FIRST, 0.2),
            {"net.0.bias": 0.05} | dict.fromkeys(ALL - {"net.0.bias"}, 0.2),
        ],
    ),
}


@pytest.mark.parametrize("units", ["loss", "paper"])
@pytest.mark.parametrize("name", CASES)
def test_a_parameter_counts_in_the_steps_that_trained_it(name, units, tmp_path):
    make, callback, rates = CASES[name]
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(9, 5, generator=draw, dtype=torch.float64), torch.randint(3, (9,), generator=draw))
    torch.manual_seed(0)
    module = make(mlp()).double()
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[callback, Influence(dirpath=tmp_path)])
    trainer.fit(module, DataLoader(data, 3))
    trajectory = Trajectory.load(tmp_path)

    expected, ones = 0.0, [default_collate([item]) for item in data]
    for checkpoint, by_name in zip(trajectory.checkpoints[1:], rates, strict=True):
        rows = oracles.rows(module, ones, sorted(by_name), state=checkpoint.load().parameters)
        for parameter, rate in by_name.items():
            one = {parameter: rows[parameter]}
            expected = expected + oracles.inner(one, one) * rate / (3 if units == "loss" else 1)
    for asked in (module, make(mlp()).double()):  # as the fit left it, and one where nothing is frozen
        scores = Attributor(asked, data, trajectory).score(TracInCP(units=units), data)
        oracles.assert_scores(scores.values, expected, 1e-10)
