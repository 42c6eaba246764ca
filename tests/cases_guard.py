"""Examples that weigh otherwise in a batch than alone, on every path; and losses that eval mode cuts off."""

import torch
from case import Case, Items, Step, both, drawn, inputs, mlp
from torch import nn
from torch.nn import functional as F

WAY_OUT = ("Pass `loss=`", "per-sample losses")
TOKENS = 10
MET, MISSED = 27, 34  # of 80 examples the sample before scoring has one and not the other


class Sorted(nn.Module):
    """Reorders the batch inside, so that there is no factored rule; ``torch.func`` follows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        order = x.flatten(1)[:, 0].argsort()
        return self.net(x[order])[order.argsort()]


class ReadsNumber(Sorted):
    """Reads a number as well, which ``torch.func`` refuses: one example at a time."""

    def forward(self, x):
        return super().forward(x if float(x.detach().sum()) < 1e9 else -x)


PATHS = {"factored": lambda net: net, "torch.func": Sorted, "one by one": ReadsNumber}


def token_labels(odd, n=80, seed=1):
    """(x [time, 5], y [time]) with two labels of ten where the example is odd."""

    def make():
        g = drawn(seed)
        x, y = torch.randn(n, TOKENS, 5, generator=g, dtype=torch.float64), torch.randint(3, (n, TOKENS), generator=g)
        for i in odd:
            y[i, 2:] = -100
        return Items(list(zip(x, y, strict=True)))

    return make


def number_targets(odd, n=80, seed=1):
    """(x, y [3]) with two NaN where the example is odd."""

    def make():
        g = drawn(seed)
        x, y = (torch.randn(n, k, generator=g, dtype=torch.float64) for k in (5, 3))
        for i in odd:
            y[i, 1:] = torch.nan
        return Items(list(zip(x, y, strict=True)))

    return make


def masks(odd, n=80, seed=1):
    """(x [time, 5], y [time], mask [time] of 0.0 and 1.0)."""

    def make():
        items = token_labels((), n, seed)().items
        ones = torch.ones(TOKENS, dtype=torch.float64)
        return Items([(x, y, ones * (torch.arange(TOKENS) < (2 if i in odd else 9))) for i, (x, y) in enumerate(items)])

    return make


def importances(odd, n=80, seed=1):
    """(x, y, weight)."""

    def make():
        items = inputs(5, n=n, seed=seed)().items
        return Items([(x, y, torch.tensor(3.0 if i in odd else 1.0).double()) for i, (x, y) in enumerate(items)])

    return make


def classes(odd, of, n=80, seed=1):
    """(x, y), y of another class where the example is odd."""

    def make():
        items = inputs(5, n=n, seed=seed, classes=2)().items
        return Items([(x, torch.tensor(of) if i in odd else y) for i, (x, y) in enumerate(items)])

    return make


class OverTokens(Step):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).transpose(1, 2), batch[1])


class OverKnown(Step):
    def training_step(self, batch, batch_idx):
        known = ~batch[1].isnan()
        return F.mse_loss(self.net(batch[0])[known], batch[1][known])


class OverMask(Step):
    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        return (F.cross_entropy(self.net(x).transpose(1, 2), y, reduction="none") * mask).sum() / mask.sum()


class ByImportance(Step):
    def training_step(self, batch, batch_idx):
        x, y, weight = batch
        return (weight * F.cross_entropy(self.net(x), y, reduction="none")).sum() / weight.sum()


class ByClass(Step):
    weights = torch.tensor([1.0, 1.0, 4.0, 1.0], dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        weight = self.weights[batch[1]]
        return (weight * F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")).sum() / weight.sum()


def tokens_each(module, batch):
    losses = F.cross_entropy(module.net(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return losses.sum(1) / (batch[1] >= 0).sum(1)


def known_each(module, batch):
    known = ~batch[1].isnan()
    return ((module.net(batch[0]) - batch[1].nan_to_num()).square() * known).sum(1) / known.sum(1)


def masked_each(module, batch):
    losses = F.cross_entropy(module.net(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return (losses * batch[2]).sum(1) / batch[2].sum(1)


def weighted_each(module, batch):
    return batch[2] * F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def by_class_each(module, batch):
    return ByClass.weights[batch[1]] * F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def labelled_each(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def mixing(module, batch):
    """Divides by the labels of the whole batch."""
    losses = F.cross_entropy(module.net(batch[0]).transpose(1, 2), batch[1], reduction="none").sum(1)
    return losses * len(batch[1]) / (batch[1] >= 0).sum()


KINDS = {
    "ignore_index": (OverTokens, mlp, token_labels, tokens_each, "2 of 10 labels"),
    "NaN among targets": (OverKnown, mlp, number_targets, known_each, "2 of 3 NaN"),
    "a mask of numbers": (OverMask, mlp, masks, masked_each, "2 of 10 entries other than 0"),
    "weights in the batch": (ByImportance, mlp, importances, weighted_each, "`batch[2]` is 3"),
    "a rare class of another weight": (
        ByClass,
        lambda: mlp(classes=4),
        lambda odd, n=80, seed=1: classes(odd, 2, n, seed),
        by_class_each,
        "`batch[1]` is 2",
    ),
    "an example without a label": (
        Step,
        mlp,
        lambda odd, n=80, seed=1: classes(odd, -100, n, seed),
        labelled_each,
        "`batch[1]` is -100",
    ),
}


def odd_example(kind, path, odd):
    step, net, data, each, unusual = KINDS[kind]
    where = "met by the self-check" if odd == MET else "met later"
    name = f"one of 80 unlike the others, {kind}, {path}, {where}"
    if kind != "an example without a label":  # recognised as a mean over what the examples have unequally much of
        return Case(name, lambda: step(PATHS[path](net())), data((odd,)), data((), 4, 2))
    return Case(
        name,
        lambda: step(PATHS[path](net())),
        data((odd,)),
        data((), 4, 2),
        expected="refused",
        says=(f"Expected example {odd} to weigh", unusual, *WAY_OUT),
        way_out=each,
    )


ODD = [odd_example(kind, path, odd) for kind in KINDS for path in PATHS for odd in (MET, MISSED)]
ODD += [
    Case(
        f"loss= that divides by the labels of its batch, {path}",
        lambda path=path: OverTokens(PATHS[path](mlp())),
        token_labels((MISSED,)),
        token_labels((), 4, 2),
        loss=mixing,
        expected="refused",
        says=(f"Expected example {MISSED} to weigh", "2 of 10 labels", "`loss=`", "per-sample losses"),
    )
    for path in PATHS
]
ODD += [
    Case(
        f"a mean within each example of unlike lengths, {path}",
        lambda path=path: MeanWithin(PATHS[path](mlp())),
        token_labels((MET, MISSED)),
        token_labels((1,), 4, 2),
    )
    for path in PATHS
]


class MeanWithin(Step):
    def training_step(self, batch, batch_idx):
        return tokens_each(self, batch).mean()


# ---- losses that eval mode cuts off ---------------------------------------------------------------------------------


class Two(Step):
    """A body and a head, with what a subclass does between them."""

    def __init__(self):
        super().__init__(mlp(hidden=4, classes=4))
        self.head, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)

    def body(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(torch.tanh(self.body(batch[0]))), batch[1])


class EnabledInTraining(Two):
    def body(self, x):
        with torch.set_grad_enabled(self.training):
            return self.net(x)


class DetachedInEval(Two):
    def body(self, x):
        return self.net(x) if self.training else self.net(x).detach()


class NoGradInEval(Two):
    def training_step(self, batch, batch_idx):
        with torch.set_grad_enabled(self.training):
            return super().training_step(batch, batch_idx)


class AsideInTraining(Two):
    """An auxiliary head, as in GoogLeNet."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:
            loss = loss + 0.3 * F.cross_entropy(self.aside(self.body(batch[0])), batch[1])
        return loss


class AsideTimesZero(Two):
    def training_step(self, batch, batch_idx):
        aside = F.cross_entropy(self.aside(self.body(batch[0])), batch[1])
        return super().training_step(batch, batch_idx) + (0.3 if self.training else 0.0) * aside


class SkippedInEval(Two):
    """A path that drops out in eval mode for good."""

    def body(self, x):
        return self.net(x) + self.extra(x) if self.training else self.net(x)

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(5, 4)


class MaskInTraining(Two):
    """A mask token in place of some inputs, only in training."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.full((5,), 0.5))

    def body(self, x):
        return self.net(torch.where(x[:, :1] > 0, self.token, x) if self.training else x)


class LossOfTraining(Two):
    """Returns a number without a gradient in eval mode."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.training else loss.detach()


class EveryOther(Two):
    """Trains the auxiliary head on odd batches, with momentum: training mode alone does not show it."""

    def training_step(self, batch, batch_idx):
        if self.training and batch_idx % 2:
            return F.cross_entropy(self.aside(self.body(batch[0])), batch[1])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


class Teacher(Two):
    """The auxiliary head follows the other one by hand; the loss never depends on it."""

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for mine, other in zip(self.aside.parameters(), self.head.parameters(), strict=True):
                mine.mul_(0.9).add_(0.1 * other)


class WithoutGradient(Two):
    """A frozen body, by ``no_grad`` in both modes."""

    @torch.no_grad()
    def body(self, x):
        return self.net(x)


class FirstEpoch(Two):
    """The auxiliary head counts in the first epoch only, whatever the mode."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 0:
            loss = loss + 0.3 * F.cross_entropy(self.aside(self.body(batch[0])), batch[1])
        return loss


class Expert(Two):
    """One example in forty goes through another head."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = super().training_step(batch, batch_idx) * len(y)
        rare = x[:, 0] > 100
        if bool(rare.any()):
            loss = loss + F.cross_entropy(self.aside(self.body(x[rare] / 100)), y[rare], reduction="sum")
        return loss / len(y)


def with_rare(n, at):
    def make():
        items = inputs(5, n=n)().items
        items[at] = (items[at][0] + 200 * (torch.arange(5) == 0), items[at][1])
        return Items(items)

    return make


def plain(module, batch):
    """The loss of training as it is without modes."""
    return F.cross_entropy(module.head(torch.tanh(module.net(batch[0]))), batch[1], reduction="none")


def plain_with_aside(module, batch):
    return plain(module, batch) + 0.3 * F.cross_entropy(module.aside(module.net(batch[0])), batch[1], reduction="none")


def plain_with_extra(module, batch):
    body = module.net(batch[0]) + module.extra(batch[0])
    return F.cross_entropy(module.head(torch.tanh(body)), batch[1], reduction="none")


def plain_with_token(module, batch):
    x = torch.where(batch[0][:, :1] > 0, module.token, batch[0])
    return F.cross_entropy(module.head(torch.tanh(module.net(x))), batch[1], reduction="none")


def cut_off(name, make, named, way_out, **options):
    says = ("eval mode", f"`{named}`", *WAY_OUT)
    return Case(name, make, **both(5), expected="refused", says=says, way_out=way_out, **options)


MODES = {
    "set_grad_enabled(self.training)": (EnabledInTraining, "net.0.bias", plain),
    "detached in eval mode": (DetachedInEval, "net.0.bias", plain),
    "no gradient at all in eval mode": (NoGradInEval, "head.bias", plain),
    "a loss without gradient in eval mode": (LossOfTraining, "head.bias", plain),
    "a head used in training only": (AsideInTraining, "aside.bias", plain_with_aside),
    "a head times 0 in eval mode": (AsideTimesZero, "aside.bias", plain_with_aside),
    "a path skipped in eval mode": (SkippedInEval, "extra.bias", plain_with_extra),
    "a mask token in training only": (MaskInTraining, "token", plain_with_token),
}
CUT_OFF = [cut_off(name, *mode) for name, mode in MODES.items()]
CUT_OFF += [cut_off(f"{name}, after a fit", *mode, fit=True) for name, mode in MODES.items()]
CUT_OFF += [
    cut_off("a head trained on odd batches", EveryOther, "aside.bias", None, fit=True),
    Case("a teacher that follows by hand", Teacher, **both(5), fit=True),
    Case("a body without gradient in both modes", WithoutGradient, **both(5), fit=True),
    Case("a head that counts in the first epoch", FirstEpoch, **both(5), fit=True),
    Case("a head that one example in forty reaches", Expert, with_rare(40, 22), inputs(5, n=4, seed=2), fit=True),
    Case("a head used in training only, left out", AsideInTraining, **both(5), parameters=["net*", "head*"]),
]

GUARD = [*ODD, *CUT_OFF]
