"""Training with trackers is training without them, to the bit; and everything touched is put back."""

import random

import pytest
import pytorch_lightning as pl
import torch
from case import Items, both
from fits import QUIET
from pytorch_lightning import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import HyDRA, Influence, TracInIdeal

DATA = both(5)
pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode", "ignore:.*is no longer tracked")


class Step(pl.LightningModule):
    """Draws random numbers, keeps statistics, counts its steps, logs; frozen and evaluating parts."""

    def __init__(self, kind, norm, fail=None, error=RuntimeError):
        super().__init__()
        middle = nn.BatchNorm1d(6) if norm else nn.LayerNorm(6)
        self.net = nn.Sequential(nn.Linear(5, 6), middle, nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.still = nn.Dropout(0.5).eval()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.kind, self.fail, self.error, self.noise = kind, fail, error, []

    def losses(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(self.still(self.frozen(x))), y, reduction="none")

    def training_step(self, batch, batch_idx):
        loss = self.losses(batch).mean()
        self.count += 1
        if self.trainer.training and int(self.count) == self.fail:
            raise self.error
        self.noise.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def on_train_epoch_start(self):
        self.still.eval()

    def configure_optimizers(self):
        groups = [p for p in self.parameters() if p.requires_grad]
        optimizer = getattr(torch.optim, self.kind)(groups, lr=0.05, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def joint(module, batch):
    return module.losses(batch)


class Watching(Callback):
    """Random states and modes as other callbacks find them."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        modes = [m.training for m in pl_module.modules()]
        wanted = [p.requires_grad for p in pl_module.parameters()]
        loss = float(outputs["loss"].detach())
        self.seen.append((torch.get_rng_state().tolist(), random.random(), modes, wanted, loss))


MODES = {
    "hydra": (HyDRA(mode="during_fit"), "SGD", False, {}),
    "hydra, fast": (HyDRA(mode="during_fit", hessian=False), "SGD", False, {}),
    "hydra, accumulated and clipped": (
        HyDRA(mode="during_fit"),
        "AdamW",
        False,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    "hydra, fast, adam, in files": (HyDRA(mode="during_fit", hessian=False, memory=1), "Adam", False, {}),
    "hydra, batch statistics": (HyDRA(mode="during_fit"), "SGD", True, {}),
    "tracin ideal": (TracInIdeal(), "AdamW", False, {}),
}


def train(method, kind, norm, options, folder, fail=None, error=RuntimeError):
    torch.manual_seed(0)
    random.seed(0)
    module, watching = Step(kind, norm, fail, error).double(), Watching()
    methods = [] if method is None else [method]
    queries = Items(DATA["queries"]().items)
    callbacks = [Influence(methods, queries=queries, dirpath=folder, loss=joint if norm else None, max_cost=1e9)]
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [*callbacks, watching], **options})
    size = 1 if isinstance(method, TracInIdeal) else 3
    torch.manual_seed(5)
    trainer.fit(module, DataLoader(DATA["train"](), size, shuffle=True))
    return module, trainer, watching, callbacks[0]


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_to_the_bit(mode, tmp_path):
    method, kind, norm, options = MODES[mode]
    module, trainer, watching, influence = train(method, kind, norm, options, tmp_path / "with")
    assert list(influence.scores) == [method.name], influence.scores.reasons
    size = 1 if isinstance(method, TracInIdeal) else 3
    torch.manual_seed(0)
    random.seed(0)
    plain, alone = Step(kind, norm).double(), Watching()
    other = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [alone], **options})
    torch.manual_seed(5)
    other.fit(plain, DataLoader(DATA["train"](), size, shuffle=True))
    assert watching.seen == alone.seen
    for (name, mine), theirs in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert module.noise == plain.noise
    assert module.__dict__.keys() == plain.__dict__.keys()
    assert trainer.logged_metrics == other.logged_metrics
    for mine, theirs in zip(trainer.optimizers, other.optimizers, strict=True):
        assert str(mine.state_dict()) == str(theirs.state_dict())
        assert not mine._optimizer_step_post_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["hydra", "hydra, fast"])
def test_an_accident_leaves_nothing_behind(mode, error, tmp_path):
    """The step fails at its third batch."""
    method, kind, norm, _ = MODES[mode]
    raised = (RuntimeError,) if error is RuntimeError else (KeyboardInterrupt, SystemExit)
    torch.manual_seed(0)
    module = Step(kind, norm, 3, error).double()
    influence = Influence([method], queries=DATA["queries"](), dirpath=tmp_path, max_cost=1e9)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [influence]})
    keys = set(module.__dict__)
    with pytest.raises(raised):
        trainer.fit(module, DataLoader(DATA["train"](), 3))
    assert set(module.__dict__) - keys <= {"_trainer", "_hparams"}
    assert "log" not in module.__dict__
    assert all(p.requires_grad for p in module.net.parameters())
    assert not any(p.requires_grad for p in module.frozen.parameters())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not list(tmp_path.rglob(".work-*"))
