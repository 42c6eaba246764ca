"""Modules of the generator: bodies that turn [batch, time, features] into features, and steps with habits."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from generated.losses import CLASSES, LOSSES

FEATURES = 3
SIZES = {"row": CLASSES, "token": CLASSES, "pair": 2, "number": 1}


class Channels(nn.Module):
    """A convolution over time with normalisation and a kink."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(FEATURES, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)
        self.pool = nn.MaxPool1d(3, 1, 1)

    def forward(self, x):
        return self.pool(F.relu(self.norm(self.convolution(x.transpose(1, 2))))).transpose(1, 2)


class Words(nn.Module):
    """Reads features as ids of a small vocabulary."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, x):
        return self.table((x[..., 0] * 2 + 3).long().clamp(0, 5))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(FEATURES, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, FEATURES)
        self.other = nn.Linear(FEATURES, FEATURES, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(FEATURES, 4)
        self.layer = nn.TransformerEncoderLayer(4, 1, 6, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(self.wide(x))


def mlp():
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh())


def half_frozen():
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    net[0].requires_grad_(False)
    return net


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 4)), nn.Tanh())


BODIES = {
    "linear": (nn.Identity, FEATURES),
    "mlp": (mlp, 4),
    "cnn": (Channels, 4),
    "embedding": (Words, 4),
    "transformer": (Attention, 4),
    "lstm": (Recurrent, 4),
    "tied": (Tied, FEATURES),
    "weight norm": (weight_normed, 4),
    "frozen": (half_frozen, 4),
}


class Made(pl.LightningModule):
    """A body, a head, a loss, and one habit of the step, which subclasses add."""

    def __init__(self, body, loss):
        super().__init__()
        make, width = BODIES[body]
        self.loss_name = loss
        self.body, self.head = make(), nn.Linear(width, SIZES[LOSSES[loss].kind])

    def outputs(self, batch):
        """Output of the head and the pooled features."""
        hidden = self.features(batch["x"])
        mask = batch["mask"].unsqueeze(-1).to(hidden)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return self.head(hidden if LOSSES[self.loss_name].kind == "token" else pooled), pooled

    def features(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return self.changed(self.plain_loss(batch), batch, batch_idx)

    def plain_loss(self, batch):
        z, pooled = self.outputs(batch)
        return LOSSES[self.loss_name].of(self, z, pooled, batch["y"])

    def changed(self, loss, batch, batch_idx):
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.groups(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def groups(self):
        return [p for p in self.parameters() if p.requires_grad]


class TwoGroups(Made):
    def groups(self):
        biases = [p for n, p in self.named_parameters() if n.endswith("bias")]
        return [{"params": [p for n, p in self.named_parameters() if not n.endswith("bias")]}] + [
            {"params": biases, "lr": 0.3}
        ]


class Squeezes(Made):
    """Drops every dimension of size one, the batch's too."""

    def outputs(self, batch):
        z, pooled = super().outputs(batch)
        return z.squeeze(), pooled


class MeanTeacher(Made):
    """Its step moves a teacher's weights after the loss."""

    def __init__(self, body, loss):
        super().__init__(body, loss)
        make, _ = BODIES[body]
        self.teacher = make().requires_grad_(False)

    def changed(self, loss, batch, batch_idx):
        loss = loss + 0.3 * (self.body(batch["x"]) - self.teacher(batch["x"]).detach()).square().mean()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
                mine.mul_(0.7).add_(theirs, alpha=0.3)
        return loss


class Centre(Made):
    """Its step moves a buffer and a plain tensor after the loss."""

    def __init__(self, body, loss):
        super().__init__(body, loss)
        self.register_buffer("centre", torch.zeros(BODIES[body][1], dtype=torch.float64))
        self.scale = torch.ones(1, dtype=torch.float64)

    def features(self, x):
        return self.body(x) - self.centre

    def changed(self, loss, batch, batch_idx):
        with torch.no_grad():
            self.centre.mul_(0.9).add_(self.body(batch["x"]).mean((0, 1)), alpha=0.1)
            self.last = batch["x"].mean()
            self.scale.mul_(0.5)
            self.scale = self.scale * 2.0
        return loss


class PlainTensor(Made):
    """Multiplies by a tensor that is neither parameter nor buffer, and keeps what it computed."""

    def __init__(self, body, loss):
        super().__init__(body, loss)
        self.factor = torch.linspace(0.5, 1.5, BODIES[body][1], dtype=torch.float64)
        self.kept = []

    def features(self, x):
        hidden = self.body(x) * self.factor
        self.kept = [*self.kept[-2:], hidden.detach()]
        return hidden


class Manual(Made):
    def __init__(self, body, loss):
        super().__init__(body, loss)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.plain_loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ReadsTrainer(Made):
    attribute = ""

    def changed(self, loss, batch, batch_idx):
        return loss * (1 + float(getattr(self.trainer, self.attribute)) / 10)


class ReadsSteps(ReadsTrainer):
    attribute = "estimated_stepping_batches"


class ReadsBatches(ReadsTrainer):
    attribute = "num_training_batches"


class ReadsEpochs(ReadsTrainer):
    attribute = "max_epochs"


class ReadsAccumulation(ReadsTrainer):
    attribute = "accumulate_grad_batches"


class ReadsEpoch(Made):
    def changed(self, loss, batch, batch_idx):
        return loss * (1 + 0.5 * self.current_epoch)


class ReadsStep(Made):
    def changed(self, loss, batch, batch_idx):
        return loss * (1 + 0.1 * self.trainer.global_step)


class ReadsDatamodule(Made):
    def changed(self, loss, batch, batch_idx):
        return loss * (2.0 if self.trainer.datamodule is None else 1.0)


class ReadsOptimizer(Made):
    def changed(self, loss, batch, batch_idx):
        return loss * (1 + self.trainer.optimizers[0].param_groups[0]["lr"])


class Parity(Made):
    def changed(self, loss, batch, batch_idx):
        return loss * (1 + batch_idx % 2)


class EveryThird(Made):
    def changed(self, loss, batch, batch_idx):
        return loss + 0.1 * self.head.weight.square().sum() if batch_idx % 3 == 2 else loss


class LogsByIndex(Made):
    def changed(self, loss, batch, batch_idx):
        if batch_idx % 2:
            self.log("loss", loss)
        return loss


class NoGradInEval(Made):
    def features(self, x):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.body(x)


class AuxiliaryWhenTraining(Made):
    """A second head whose loss exists only while training."""

    def __init__(self, body, loss):
        super().__init__(body, loss)
        self.second = nn.Linear(BODIES[body][1], 1)

    def changed(self, loss, batch, batch_idx):
        return loss + self.second(self.features(batch["x"])).square().mean() if self.training else loss


class ReturnsDict(Made):
    def changed(self, loss, batch, batch_idx):
        return {"loss": loss, "more": 2.0}


class ReadsStage(Made):
    def changed(self, loss, batch, batch_idx):
        return loss if self.trainer.training else loss * 7


class Anneals(Made):
    """The weight of its loss is a plain number, which each epoch lowers."""

    def __init__(self, body, loss):
        super().__init__(body, loss)
        self.weight = 1.0

    def on_train_epoch_start(self):
        self.weight = 1 / (1 + self.current_epoch)

    def changed(self, loss, batch, batch_idx):
        return loss * self.weight


# name -> (class, body, whether to refuse it is a fault too)
MODULES = {body: (Made, body, True) for body in BODIES} | {
    "two groups": (TwoGroups, "mlp", True),
    "squeezes": (Squeezes, "mlp", False),
    "mean teacher": (MeanTeacher, "mlp", False),
    "centre": (Centre, "mlp", False),
    "plain tensors": (PlainTensor, "mlp", True),
    "manual": (Manual, "mlp", False),
    "reads estimated_stepping_batches": (ReadsSteps, "linear", False),
    "reads num_training_batches": (ReadsBatches, "mlp", False),
    "reads max_epochs": (ReadsEpochs, "linear", False),
    "reads accumulate_grad_batches": (ReadsAccumulation, "linear", False),
    "reads current_epoch": (ReadsEpoch, "mlp", False),
    "reads global_step": (ReadsStep, "linear", False),
    "reads datamodule": (ReadsDatamodule, "linear", False),
    "reads optimizers": (ReadsOptimizer, "linear", False),
    "reads stage": (ReadsStage, "linear", False),
    "parity of the index": (Parity, "mlp", False),
    "every third batch": (EveryThird, "linear", False),
    "logs by the index": (LogsByIndex, "mlp", True),
    "no gradient in eval": (NoGradInEval, "mlp", False),
    "second head in training": (AuxiliaryWhenTraining, "mlp", False),
    "returns a dict": (ReturnsDict, "mlp", True),
    "anneals": (Anneals, "mlp", True),
}
NOT_DRAWN = ("anneals",)


def build(name, loss, seed):
    """A module in float64."""
    made, body, _ = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made(body, loss).double()
