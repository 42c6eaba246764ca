"""Batches, precision, and what a step does besides computing a loss."""

import torch
import torchmetrics
from case import Case, Items, Step, both, drawn, inputs, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate


def changed(make, change):
    """Every item of a dataset through a function of (x, y, index)."""

    def build():
        return Items([change(x, y, i) for i, (x, y) in enumerate(make().items)])

    return build


def batches(name, make, change, *shape, **fields):
    data = both(*shape or (5,))
    return Case(name, make, changed(data["train"], change), changed(data["queries"], change), **fields)


class DictStep(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch["x"]), batch["y"])


class NestedStep(Step):
    def training_step(self, batch, batch_idx):
        (image, more), meta = batch["in"], batch["meta"]
        assert isinstance(meta["name"][0], str)
        return self.loss(self.net(image + 0.1 * more["noise"]), meta["y"])


class BatchOnly(Step):
    def training_step(self, batch):
        return self.loss(self.net(batch[0]), batch[1])


class OtherName(Step):
    """Lightning passes the index by position."""

    def training_step(self, batch, i):
        return self.loss(self.net(batch[0]), batch[1]) + 0.0 * i


class StarArguments(Step):
    def training_step(self, *args):
        return self.loss(self.net(args[0][0]), args[0][1]) + 0.0 * args[1]


class WritesIntoBatch(Step):
    """Scales its input in place, pops from the dict: the next pass must see neither."""

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch.pop("y")
        x.mul_(0.5).sub_(0.1)
        return self.loss(self.net(x), y)


class WithMetrics(Step):
    def __init__(self):
        super().__init__(mlp())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.seen = torchmetrics.CatMetric()

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        loss = self.loss(out, batch[1])
        self.accuracy(out, batch[1])
        self.mean.update(loss.detach().float())
        self.seen.update(loss.detach())
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"mean": self.mean.compute()})
        return loss


class MetricInLoss(Step):
    """The error's value enters the loss through a metric."""

    def __init__(self):
        super().__init__(mlp())
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch, batch_idx):
        return self.error(self.net(batch[0])[:, 0], batch[1])


class Busy(Step):
    """Everything that a step may touch besides its loss."""

    def __init__(self):
        super().__init__(mlp())
        self.history, self.by_name, self.nested, self.seen = [], {"n": 0}, {"of": {"losses": []}}, set()
        self.best = None

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1]) * (1 + self.current_epoch + self.global_step)
        self.history.append(loss.detach())
        self.by_name["n"] += 1
        self.nested["of"]["losses"].append(loss.item())
        self.seen.add(len(self.history))
        self.best = loss.item() if self.best is None else min(self.best, loss.item())
        self.fresh = loss.detach()
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.print("loss", loss)
        if self.trainer is not None and self.trainer.is_global_zero:
            self.log_dict({"a": loss, "b": loss})
        return loss * (1 + len(self.history) / 10)


class TransferHook(Step):
    """Changes the batch on its way to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2 - 0.3, batch[1]]


class ModeDependent(Step):
    def training_step(self, batch, batch_idx):
        x = batch[0] + torch.randn_like(batch[0]) if self.training else batch[0]
        return self.loss(self.net(x), batch[1])


class Noisy(Items):
    """A random transform; remembers what it gave, so that a test can ask for the same."""

    def __init__(self, items):
        super().__init__(items)
        self.given = {}

    def __getitem__(self, i):
        x, y = self.items[i]
        item = x + 0.5 * torch.randn(x.shape, dtype=x.dtype), y
        self.given[i] = item
        return item


class Padded(Step):
    def training_step(self, batch, batch_idx):
        x, mask, y = batch
        h = torch.tanh(self.net[0](x)) * mask[..., None]
        return self.loss(self.net[1](h.sum(1) / mask.sum(1, keepdim=True)), y)


def padded(items):
    longest = max(len(x) for x, _ in items)
    x = torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x, _ in items])
    mask = torch.stack([(torch.arange(longest) < len(x)).to(x) for x, _ in items])
    return x, mask, torch.tensor([y for _, y in items])


def sequences(n, seed):
    g = drawn(seed)
    return lambda: Items([(torch.randn(2 + 3 * i % 5, 4, generator=g, dtype=torch.float64), i % 3) for i in range(n)])


class Concatenated(Step):
    """Sequences end to end with their lengths: no tensor has the example in front."""

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        h = torch.tanh(self.net[0](x))
        owner = torch.repeat_interleave(torch.arange(len(y)), lengths)
        return self.loss(self.net[1](h.new_zeros(len(y), h.shape[1]).index_add(0, owner, h)), y)


def concatenated(items):
    return (
        torch.cat([x for x, _ in items]),
        torch.tensor([len(x) for x, _ in items]),
        torch.tensor([y for _, y in items]),
    )


def last_longer(n, seed):
    """Equal lengths but for a few examples far behind, whose mean length is that of the others."""

    def make():
        g = drawn(seed)
        length = [3] * n
        length[5], length[6] = 1, 5
        return Items([(torch.randn(length[i], 4, generator=g, dtype=torch.float64), i % 3) for i in range(n)])

    return make


def sequence_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def channels_last(items):
    x, y = default_collate(items)
    return x.to(memory_format=torch.channels_last), y


def strided(items):
    x, y = default_collate(items)
    return torch.stack([x, x], -1)[..., 0], y


def image_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(1),
    )


def single(make, *shape, **fields):
    return {"make": make, **both(*shape, dtype=torch.float32), "dtype": torch.float32, **fields}


def classifier():
    return Step(mlp())


BATCHES = [
    batches("dict", lambda: DictStep(mlp()), lambda x, y, i: {"x": x, "y": y}, fit=True),
    batches(
        "dict with strings, numbers and lists",
        lambda: DictStep(mlp()),
        lambda x, y, i: {"x": x, "y": y, "id": i, "name": f"img{i}", "box": [i, i + 1], "scale": 0.5},
        fit=True,
    ),
    batches(
        "nested tuples and dicts",
        lambda: NestedStep(mlp()),
        lambda x, y, i: {"in": (x, {"noise": x.flip(0)}), "meta": {"y": y, "name": f"n{i}"}},
    ),
    batches(
        "scalar entries that collate leaves alone",
        lambda: DictStep(mlp()),
        lambda x, y, i: {"x": x, "y": y},
        collate=lambda items: {
            **default_collate(items),
            "temperature": 0.7,
            "anchors": torch.arange(5.0),
            "k": torch.tensor(3),
        },
    ),
    Case("training_step(batch) without an index", lambda: BatchOnly(mlp()), **both(5)),
    Case("training_step(batch, i)", lambda: OtherName(mlp()), **both(5), fit=True),
    Case("training_step(*args)", lambda: StarArguments(mlp()), **both(5)),
    batches(
        "a step that writes into its batch", lambda: WritesIntoBatch(mlp()), lambda x, y, i: {"x": x, "y": y}, fit=True
    ),
    Case("batch transfer hooks", lambda: TransferHook(mlp()), **both(5), fit=True),
    Case("a step that asks for its mode", lambda: ModeDependent(mlp()), **both(5), fit=True),
    Case(
        "sequences padded by collate",
        lambda: Padded(sequence_net()),
        sequences(8, 1),
        sequences(4, 2),
        collate=padded,
        fit=True,
    ),
    Case(
        "sequences end to end",
        lambda: Concatenated(sequence_net()),
        sequences(8, 1),
        sequences(4, 2),
        collate=concatenated,
    ),
    Case(
        "sequences end to end, nearly all of one length",
        lambda: Concatenated(sequence_net()),
        last_longer(60, 1),
        last_longer(8, 2),
        collate=concatenated,
    ),
    Case(
        "random transforms",
        classifier,
        lambda: Noisy(inputs(5)().items),
        lambda: Noisy(inputs(5, n=4, seed=2)().items),
        fit=False,
    ),
    Case("channels last", lambda: Step(image_net()), **both(3, 6, 5), collate=channels_last, fit=True),
    Case(
        "channels last in the weights",
        lambda: Step(image_net()).to(memory_format=torch.channels_last),
        **both(3, 6, 5),
        collate=channels_last,
    ),
    Case("inputs with gaps in memory", lambda: Step(image_net()), **both(3, 6, 5), collate=strided),
    Case("torchmetrics in the step", WithMetrics, **both(5), fit=True),
    Case("a metric inside the loss", MetricInLoss, **both(5, target="number"), tolerance=1e-5),
    Case("logs, counters, lists, self.trainer", Busy, **both(5), fit=True),
    Case("MLP in float32", **single(classifier, 5, fit=True)),
    Case("CNN in float32", **single(lambda: Step(image_net()), 3, 6, 5, fit=True)),
    Case("bf16-mixed Trainer", **single(classifier, 5, fit=True, trainer={"precision": "bf16-mixed"})),
    Case("16-mixed Trainer", **single(classifier, 5, trainer={"precision": "16-mixed"})),
    Case("64-true Trainer", **single(classifier, 5, fit=True, trainer={"precision": "64-true"})),
    Case("32-true Trainer", **single(lambda: Step(image_net()), 3, 6, 5, trainer={"precision": "32-true"})),
]
