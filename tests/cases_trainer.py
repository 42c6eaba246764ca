"""Steps that write into the module's own state: each pass starts from the same state, which is put back."""

import copy

import pytorch_lightning as pl
import torch
from case import Case, Step, both, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


def frozen_copy(net):
    return copy.deepcopy(net).requires_grad_(False)


class MeanTeacher(Step):
    """The teacher follows the student inside the step, by the statement of ``write``."""

    def __init__(self, write, after=False, trains=False):
        super().__init__(mlp())
        self.teacher = copy.deepcopy(self.net) if trains else frozen_copy(self.net)
        self.write, self.after = write, after

    def follow(self):
        with torch.no_grad():
            for mine, its in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                self.write(its, mine)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not self.after:
            self.follow()
        with torch.no_grad():
            target = self.teacher(x)
        loss = F.cross_entropy(self(x), y) + (self(x) - target - 1.0).square().mean()
        if self.after:
            self.follow()
        return loss


def through_data(its, mine):
    its.data.mul_(0.9).add_(mine.data, alpha=0.1).add_(0.05)


def other_data(its, mine):
    its.data = 0.9 * its.data + 0.1 * mine.data + 0.05


def assigned(its, mine):
    its.set_((0.9 * its + 0.1 * mine + 0.05).detach())


def in_place(its, mine):
    its.lerp_(mine, 0.1).add_(0.05)


def copied(its, mine):
    its.copy_(0.9 * its + 0.1 * mine + 0.05)


class LoadedTeacher(MeanTeacher):
    """The teacher is loaded from a state_dict."""

    def follow(self):
        mine, its = self.net.state_dict(), self.teacher.state_dict()
        self.teacher.load_state_dict({name: 0.9 * its[name] + 0.1 * mine[name] + 0.05 for name in its})


class HiddenTeacher(MeanTeacher):
    """The teacher is in a list, so that it is in no state_dict."""

    def __init__(self, write):
        super().__init__(write)
        self.hidden = [self._modules.pop("teacher").double()]

    @property
    def teacher(self):
        return self.hidden[0]


class Average:
    """An average of the weights that is no module."""

    def __init__(self, net):
        self.shadow = {name: p.detach().double() for name, p in net.named_parameters()}
        self.updates = 0

    def update(self, net):
        self.updates += 1
        for name, p in net.named_parameters():
            self.shadow[name].mul_(0.9).add_(p.detach(), alpha=0.1)


class WithAverage(Step):
    def __init__(self):
        super().__init__(mlp())
        self.average = Average(self.net)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.average.update(self.net)
        with torch.no_grad():
            target = torch.func.functional_call(self.net, self.average.shadow, (x,))
        return F.cross_entropy(self(x), y) + (self(x) - target).square().mean()


class RunningCentre(Step):
    """The centre of the outputs moves in every step; as a buffer, a parameter or a plain tensor."""

    def __init__(self, kind, silent=False):
        super().__init__(mlp())
        centre = torch.zeros(3)
        if kind == "buffer":
            self.register_buffer("centre", centre)
        else:
            self.centre = nn.Parameter(centre, requires_grad=False) if kind == "parameter" else centre.double()
        self.silent = silent

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        centre = self.centre if self.silent else self.centre.clone()
        loss = F.cross_entropy(out - centre, y) + ((out * centre) ** 2).mean()
        with torch.no_grad():
            (self.centre.data if self.silent else self.centre).mul_(0.9).add_(out.mean(0), alpha=0.1).add_(0.1)
        return loss


class ScaledBuffer(Step):
    """A buffer is written first and multiplied into the graph afterwards: the backward pass needs what was written."""

    def __init__(self):
        super().__init__(mlp())
        self.register_buffer("scale", torch.ones(5))

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            self.scale.mul_(2.0)
        return self.loss(self.net(torch.tanh(x) * 0.1 + self.net[0].weight.mean(0) * self.scale), y)


class Clipped(Step):
    """Weights are clipped in the step before they are used."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p in self.net.parameters():
                p.clamp_(-0.2, 0.2)
        return super().training_step(batch, batch_idx)


class ClippedThroughData(Clipped):
    def training_step(self, batch, batch_idx):
        for p in self.net.parameters():
            p.data.clamp_(-0.2, 0.2)
        return Step.training_step(self, batch, batch_idx)


class Queue(Step):
    """Contrasts with a queue of earlier outputs, which the step fills."""

    def __init__(self, parameter=False):
        super().__init__(mlp())
        queue = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
        if parameter:
            self.queue = nn.Parameter(queue, requires_grad=False)
        else:
            self.register_buffer("queue", queue)
        self.at = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y) + (out @ self.queue.T.clone()).logsumexp(1).mean()
        with torch.no_grad():
            for row in out:
                self.queue.data[self.at] = row
                self.at = (self.at + 1) % len(self.queue)
        return loss


def case(name, make, **options):
    return Case(name, make, **both(5), **options)


WRITES = {
    "`.data` in place": through_data,
    "other `.data`": other_data,
    "`set_`": assigned,
    "`lerp_`": in_place,
    "`copy_`": copied,
}
TEACHERS = [
    case(f"a mean teacher that the step moves {'after' if after else 'before'} its loss: {name}",
         lambda write=write, after=after: MeanTeacher(write, after))
    for name, write in WRITES.items()
    for after in (False, True)
]  # fmt: skip
STATE = [
    *TEACHERS,
    case("a mean teacher that requires gradients", lambda: MeanTeacher(through_data, trains=True)),
    case("a mean teacher by `load_state_dict`", lambda: LoadedTeacher(None)),
    case("a mean teacher in a list", lambda: HiddenTeacher(through_data)),
    case("an average of the weights that is no module", WithAverage),
    *(case(f"a running centre in a {kind}", lambda kind=kind: RunningCentre(kind))
      for kind in ("buffer", "parameter", "plain tensor")),
    *(case(f"a running centre in a {kind}, through `.data`", lambda kind=kind: RunningCentre(kind, silent=True))
      for kind in ("buffer", "parameter", "plain tensor")),
    case("a buffer that the step writes and then multiplies by", ScaledBuffer),
    case("weights that the step clips", lambda: Clipped(mlp())),
    case("weights that the step clips through `.data`", lambda: ClippedThroughData(mlp())),
    case("a queue of earlier outputs", Queue),
    case("a queue of earlier outputs in a parameter", lambda: Queue(parameter=True)),
]  # fmt: skip


# ---- reads of the Trainer -------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.num_classes, self.shift = 3, torch.tensor([0.1, 0.2, 0.3])
        self.options = {"scale": [1.0, 1.5]}

    def weight(self, power=1):
        return 1.5**power

    def train_dataloader(self):
        return DataLoader(both(5)["train"](), 3)


class Reads(Step):
    """The loss is scaled by what is read of the Trainer."""

    def __init__(self, read, net=mlp):
        super().__init__(net())
        self.read = read

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 0.1 * float(self.read(self)))


class ReadsInHook(Reads):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x * float(self.read(self)), y

    def training_step(self, batch, batch_idx):
        return Step.training_step(self, batch, batch_idx)


class Helper:
    """Reads on behalf of the step, in a class of its own."""

    def __init__(self, module):
        self.progress = module.global_step / module.trainer.estimated_stepping_batches


def reads(name, read, make=Reads, **options):
    return Case(
        f"the step reads {name}, in a later process",
        lambda: make(read),
        **both(5),
        offline=True,
        fit_with=Data,
        **options,
    )


PLAIN = {
    "`max_epochs`": lambda m: m.trainer.max_epochs,
    "`estimated_stepping_batches`": lambda m: m.trainer.estimated_stepping_batches,
    "`num_training_batches`": lambda m: m.trainer.num_training_batches,
    "`accumulate_grad_batches`": lambda m: m.trainer.accumulate_grad_batches,
    "`fit_loop.max_epochs`": lambda m: m.trainer.fit_loop.max_epochs,
    "the length of its loader": lambda m: len(m.trainer.train_dataloader),
    "the length of its dataset": lambda m: len(m.trainer.train_dataloader.dataset) / 10,
    "the loader's batch size": lambda m: m.trainer.train_dataloader.batch_size,
    "a number of its DataModule": lambda m: m.trainer.datamodule.num_classes,
    "a tensor of its DataModule": lambda m: m.trainer.datamodule.shift.sum(),
    "a dict of its DataModule": lambda m: m.trainer.datamodule.options["scale"][1],
    "a method of its DataModule": lambda m: m.trainer.datamodule.weight(power=2),
    "whether its DataModule has something": lambda m: hasattr(m.trainer.datamodule, "nothing"),
    "the class of its DataModule": lambda m: isinstance(m.trainer.datamodule, Data),
    "`callback_metrics`": lambda m: m.trainer.callback_metrics.get("loss", 0.5),
    "the epoch's share": lambda m: m.current_epoch / m.trainer.max_epochs,
    "the step's share, in a helper": lambda m: Helper(m).progress,
    "the optimizer's momentum": lambda m: m.optimizers().param_groups[0]["momentum"] + 1,
    "the number of optimizers": lambda m: len(m.trainer.optimizers),
    "stage and rank": lambda m: not m.trainer.sanity_checking and m.trainer.is_global_zero,
    "`world_size`": lambda m: m.trainer.world_size,
}
READS = [
    *(reads(name, read) for name, read in PLAIN.items()),
    Case("the step reads `max_epochs` in a transfer hook, in a later process",
         lambda: ReadsInHook(PLAIN["`max_epochs`"]), **both(5), offline=True),
    reads(
        "`accumulate_grad_batches` later only",
        lambda m: m.trainer.accumulate_grad_batches if not m.training else 1,
        expected="refused",
        says=("trainer.accumulate_grad_batches", "did not read in the fit's first batch", "`trainer=`", "`loss=`"),
    ),
    reads(
        "`is_last_batch`",
        lambda m: m.trainer.is_last_batch,
        expected="refused",
        says=("trainer.is_last_batch", "differs from batch to batch", "`loss=`"),
    ),
    *(
        Case(f"without a fit the step reads {name}", lambda read=read: Reads(read), **both(5), expected="refused",
             says=("Expected `trainer.", "which no run has recorded", "`trainer=`", "`loss=`"))
        for name, read in {**PLAIN, "`lr_schedulers()`": lambda m: m.lr_schedulers().get_last_lr()[0]}.items()
        if name not in ("stage and rank", "`world_size`", "the step's share, in a helper", "the epoch's share")
    ),
    case("without a fit the step logs", lambda: Reads(lambda m: m.log("a", 1.0) or m.logger is None)),
]  # fmt: skip


# ---- layers that a new module does not have -------------------------------------------------------------------------


class Configured(Step):
    """Its layers are made in `configure_model`."""

    def __init__(self):
        super().__init__(None)

    def configure_model(self):
        if self.net is None:
            self.net = mlp()


def lazily():
    return Step(nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyBatchNorm1d(), nn.Linear(6, 3)))


def lazy_convolutions():
    layers = nn.LazyConv1d(4, 3, groups=2), nn.Tanh(), nn.LazyConvTranspose1d(3, 2), nn.Flatten(), nn.LazyLinear(3)
    return Step(nn.Sequential(*layers))


LAYERS = [
    Case("layers of `configure_model`, in a later process", Configured, **both(5, dtype=torch.float32), offline=True,
         dtype=torch.float32),
    Case("lazy layers, in a later process", lazily, **both(5), offline=True),
    Case("lazy convolutions, in a later process", lazy_convolutions, **both(2, 7), offline=True),
]  # fmt: skip
TRAINER = [*STATE, *READS, *LAYERS]
