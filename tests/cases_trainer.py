"""Steps that write into the module's own state: each pass starts from the same state, which is put back."""

import copy

import torch
from case import Case, Step, both, mlp
from torch import nn
from torch.nn import functional as F


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
            self.shadow[name].mul_(0.9).add_(p.detach(), alpha=0.1).add_(0.05 * self.updates)


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
TRAINER = [*STATE]
