"""Losses: every reduction, and everything that mixes the examples of a batch."""

import pytorch_lightning as pl
import torch
from case import Case, Items, Step, both, drawn, inputs, mlp
from torch import nn
from torch.nn import functional as F

WAY_OUT = ("Pass `loss=`", "per-sample losses")
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def step_with(loss, net=mlp, **options):
    return lambda: Step(net(), loss, **options)


def per_sample(function):
    """``loss=`` from a function of outputs and targets that gives one number an example."""
    return lambda module, batch: function(module(batch[0]), batch[1])


def each(loss, **options):
    return per_sample(lambda out, y: loss(out, y, reduction="none", **options))


def refused(name, loss, way_out, cause, *shape, net=mlp, **options):
    return Case(
        name,
        step_with(loss, net),
        **both(*shape, **options),
        expected="refused",
        says=(cause, *WAY_OUT),
        way_out=way_out,
    )


def tokens(net_width=4):
    return nn.Sequential(nn.Embedding(9, net_width), nn.Tanh(), nn.Linear(net_width, 3))


def of_tokens(loss):
    """Cross entropy of [batch, time, class] against [batch, time]."""
    return lambda out, y: loss(out.transpose(1, 2), y)


def ragged_targets(unequal, n, seed):
    """Token ids with targets of which some are -100: as many in every example, or not."""

    def make():
        g = drawn(seed)
        x, y = torch.randint(9, (n, 6), generator=g), torch.randint(3, (n, 6), generator=g)
        for i in range(n):
            y[i, : 2 + (i % 3 if unequal else 0)] = -100
        return Items(list(zip(x, y, strict=True)))

    return make


def rarely_ragged(n, seed):
    """Only two of many examples have another number of targets: no small sample shows them."""

    def make():
        g = drawn(seed)
        x, y = torch.randint(9, (n, 6), generator=g), torch.randint(3, (n, 6), generator=g)
        y[:, 0] = -100
        y[[6, 34], :4] = -100
        return Items(list(zip(x, y, strict=True)))

    return make


def masked_mean(out, y):
    """A hand-written mean over tokens."""
    mask = (y >= 0).to(out)
    losses = F.cross_entropy(out.transpose(1, 2), y.clamp_min(0), reduction="none")
    return (losses * mask).sum() / mask.sum()


def targets_of(item):
    return (item[1] >= 0).sum()


def contrastive(out, y):
    out = F.normalize(out, dim=1)
    return F.cross_entropy(out @ out.T / 0.5, torch.arange(len(out)))


def weighted_by_hand(out, y):
    w = WEIGHTS[y]
    return (w * F.cross_entropy(out, y, reduction="none")).sum() / w.sum()


def hardest_half(out, y):
    return F.cross_entropy(out, y, reduction="none").topk(max(1, len(y) // 2)).values.mean()


class SeveralLosses(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        main, entropy = F.cross_entropy(out, y), -(out.softmax(1) * out.log_softmax(1)).sum(1).mean()
        return {"loss": main + 0.1 * entropy + 0.01 * out.square().mean(), "logits": out.detach(), "name": "main"}


class Regularised(Step):
    """The penalty counts once a batch: for a batch of one, too."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x), y) + 0.05 * sum(p.square().sum() for p in self.parameters())


class WithItem(Step):
    """Reads numbers out of tensors."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.last = self.loss(out, y).item()
        self.log("train/loss", self.last, prog_bar=True)
        return self.loss(out, y) * (2.0 if float(self.last) > -1 else 1.0)


class Vae(Step):
    def __init__(self):
        super().__init__(nn.Linear(5, 4))
        self.decoder = nn.Linear(2, 5)

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.net(batch[0]).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return F.mse_loss(self.decoder(z), batch[0])

    def at_mean(self, batch):
        mean, log_variance = self.net(batch[0]).chunk(2, 1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (self.decoder(mean) - batch[0]).square().mean(1) + 0.01 * kl


class Manual(Step):
    """Steps its optimizer itself: running it would move the weights."""

    def __init__(self):
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Skipping(Step):
    """Lightning lets a step return None to skip a batch."""

    def training_step(self, batch, batch_idx):
        return None


class Unreduced(Step):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class NoStep(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()


def batch_statistics_net():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3))


def unet_like():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def autoencoder():
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))


class Autoencoder(Step):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[0])


MIXES = "mean or the sum"
SUM = nn.CrossEntropyLoss(reduction="sum")

LOSSES = [
    Case("sum over the batch", step_with(SUM), **both(5), fit=True, summed=True),
    Case("label smoothing", step_with(nn.CrossEntropyLoss(label_smoothing=0.1)), **both(5)),
    Case(
        "mean squared error", step_with(lambda out, y: F.mse_loss(out[:, 0], y)), **both(5, target="number"), fit=True
    ),
    Case("mean squared error over several outputs", lambda: Autoencoder(autoencoder()), **both(5)),
    Case(
        "Huber loss, summed",
        step_with(lambda out, y: F.huber_loss(out[:, 0], y, reduction="sum")),
        **both(5, target="number"),
        summed=True,
    ),
    Case(
        "binary cross entropy",
        step_with(lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y, pos_weight=torch.tensor(3.0))),
        **both(5, target="binary"),
    ),
    Case("segmentation map", step_with(F.cross_entropy, unet_like), **both(2, 5, 4, target=(5, 4)), fit=True),
    Case("sequence labels", step_with(of_tokens(F.cross_entropy), tokens), **both(6, high=9, target=(6,)), fit=True),
    Case(
        "class weights without dividing by them",
        step_with(nn.CrossEntropyLoss(WEIGHTS, reduction="sum")),
        **both(5),
        summed=True,
    ),
    Case("equal class weights", step_with(nn.CrossEntropyLoss(torch.full((3,), 2.0, dtype=torch.float64))), **both(5)),
    Case("several losses and auxiliary outputs", lambda: SeveralLosses(mlp()), **both(5), fit=True),
    Case("regulariser inside the loss", lambda: Regularised(mlp()), **both(5)),
    Case("numbers read out of the loss", lambda: WithItem(mlp()), **both(5)),
    Case(
        "ignore_index, as many in every example",
        step_with(of_tokens(F.cross_entropy), tokens),
        ragged_targets(False, 8, 1),
        ragged_targets(False, 4, 2),
    ),
    Case(
        "loss=: another loss than the step's",
        step_with(F.cross_entropy),
        **both(5),
        loss=each(F.cross_entropy, label_smoothing=0.3),
        fit=True,
    ),
    Case(
        "class weights",
        step_with(nn.CrossEntropyLoss(WEIGHTS)),
        **both(5),
        fit=True,
        count=lambda item: WEIGHTS[item[1]],
    ),
    Case(
        "class weights by hand", step_with(weighted_by_hand), **both(5), fit=True, count=lambda item: WEIGHTS[item[1]]
    ),
    refused("contrastive loss", contrastive, each(F.cross_entropy), MIXES, 5),
    refused("batch statistics in eval mode", F.cross_entropy, None, MIXES, 5, net=batch_statistics_net),
    refused("the hardest half of a batch", hardest_half, each(F.cross_entropy), MIXES, 5),
    Case(
        "ignore_index, unequal lengths",
        step_with(of_tokens(F.cross_entropy), tokens),
        ragged_targets(True, 8, 1),
        ragged_targets(True, 4, 2),
        fit=True,
        count=targets_of,
    ),
    Case(
        "masked mean by hand, unequal lengths",
        step_with(masked_mean, tokens),
        ragged_targets(True, 8, 1),
        ragged_targets(True, 4, 2),
        fit=True,
        count=targets_of,
    ),
    Case(
        "ignore_index, unequal in two of eighty",
        step_with(of_tokens(F.cross_entropy), tokens),
        rarely_ragged(80, 1),
        ragged_targets(False, 4, 2),
        fit=True,
        count=targets_of,
    ),
    Case(
        "ignore_index, unequal in queries alone",
        step_with(of_tokens(F.cross_entropy), tokens),
        ragged_targets(False, 8, 1),
        ragged_targets(True, 4, 2),
        fit=True,
        count=targets_of,
    ),
    Case(
        "noise in eval mode (VAE)",
        Vae,
        **both(5),
        expected="refused",
        says=(MIXES, "random", *WAY_OUT),
        way_out=lambda module, batch: module.at_mean(batch),
    ),
    Case(
        "manual optimization",
        Manual,
        **both(5),
        expected="refused",
        says=("manual optimization", *WAY_OUT),
        way_out=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1], reduction="none"),
    ),
    Case(
        "a step that returns None",
        lambda: Skipping(mlp()),
        **both(5),
        expected="refused",
        says=("NoneType", *WAY_OUT),
        way_out=each(F.cross_entropy),
    ),
    Case(
        "a step that returns a loss an example",
        lambda: Unreduced(mlp()),
        **both(5),
        expected="refused",
        says=("scalar", *WAY_OUT),
        way_out=each(F.cross_entropy),
    ),
    Case(
        "loss= that reduces",
        step_with(F.cross_entropy),
        **both(5),
        loss=per_sample(F.cross_entropy),
        expected="refused",
        says=("per-sample losses [batch]",),
    ),
    Case(
        "loss= with a column too many",
        step_with(F.cross_entropy),
        **both(5),
        loss=per_sample(lambda out, y: out.square()),
        expected="refused",
        says=("per-sample losses [batch]",),
    ),
]


def with_nan(at, **options):
    def make():
        data = inputs(5, **options)()
        x, y = data.items[at]
        data.items[at] = (torch.full_like(x, torch.nan), y)
        return data

    return make


LOSSES += [
    Case(
        "NaN in a training example",
        step_with(F.cross_entropy),
        with_nan(4),
        inputs(5, n=4, seed=2),
        expected="refused",
        says=("finite", "training example", "4"),
    ),
    Case(
        "NaN in a training example of many",
        step_with(F.cross_entropy),
        with_nan(38, n=60),
        inputs(5, n=4, seed=2),
        expected="refused",
        says=("finite", "training example", "38"),
    ),
    Case(
        "NaN in a query",
        step_with(F.cross_entropy),
        inputs(5),
        with_nan(2, n=4, seed=2),
        expected="refused",
        says=("finite", "quer", "2"),
    ),
]
