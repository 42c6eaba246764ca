"""Layers: every kind that has a rule, and the shapes in which they meet."""

import warnings

import torch
from case import Call, Case, Pooled, Step, Take, both, mlp, with_statistics
from torch import nn
from torch.nn import functional as F


def layer(name, make, *shape, **options):
    """A classifier around one layer."""
    fields = {k: options.pop(k) for k in ("parameters", "fit", "tolerance") if k in options}
    return Case(name, lambda: Step(make()), **both(*shape, **options), **fields)


def sequential(*layers):
    return lambda: nn.Sequential(*[make() for make in layers])


def over_space(make, channels):
    return lambda: nn.Sequential(make(), nn.Tanh(), Pooled(channels))


def token_net(embedding, head_width):
    return lambda: nn.Sequential(embedding(), nn.Tanh(), Take(), nn.Linear(head_width, 3))


def frozen(net, index):
    net[index].requires_grad_(False)
    return net


class EvenSame(nn.Conv1d):
    """Padding "same" with an even kernel pads one side more; torch warns of a copy."""

    def forward(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().forward(x)


class Scripted(nn.Module):
    """``F.linear`` with its operands by keyword."""

    def __init__(self):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(input=x, weight=self.weight, bias=self.offset)


def tied_linear():
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


class BothWays(nn.Module):
    """A square weight that multiplies from the right, and by ``linear``."""

    def __init__(self, positions=1):
        super().__init__()
        self.weight, self.head, self.positions = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3), positions

    def forward(self, x):
        x = torch.stack([x * (k + 1) for k in range(self.positions)], 1).squeeze(1)
        x = self.head(torch.tanh(F.linear(torch.tanh(x @ self.weight), self.weight)))
        return x if x.ndim == 2 else x.mean(1)


class BothWaysWithBias(nn.Module):
    """The same with a bias, both times."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.head = (
            nn.Parameter(torch.randn(5, 5)),
            nn.Parameter(torch.randn(5)),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = torch.tanh(torch.addmm(self.bias, x, self.weight))
        return self.head(torch.tanh(F.linear(x, self.weight, self.bias)))


class Odd(nn.Module):
    """A parameter of a rare kind, beside a usual network."""

    def __init__(self, odd):
        super().__init__()
        self.net, self.odd = mlp(), nn.Parameter(odd)

    def forward(self, x):
        return self.net(x) * (1 + self.odd.abs().sum())


def reused():
    shared = nn.Linear(5, 5)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 3))


def reused_convolution():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(shared, nn.Tanh(), shared, Pooled(2))


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


class WeightedBags(Bags):
    def forward(self, x):
        return self.head(self.bag(x, per_sample_weights=x.to(self.head.weight) / 3))


class FlatBags(Bags):
    """Ids in one row with offsets."""

    def forward(self, x):
        offsets = torch.arange(0, x.numel(), x.shape[1])
        return self.head(self.bag(x.flatten(), offsets))


def transposed(kind, *shape, **options):
    return layer(
        f"ConvTranspose{len(shape) - 1}d {options}".replace("{", "").replace("}", ""),
        over_space(lambda: kind(2, 4, **options), 4),
        *shape,
    )


def frozen_bias():
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


LAYERS = [
    layer("Linear", lambda: nn.Linear(5, 3), 5, fit=True),
    layer("MLP", mlp, 5, fit=True),
    layer("Linear without bias", lambda: nn.Linear(5, 3, bias=False), 5),
    layer(
        "Linear over one more dimension",
        sequential(lambda: nn.Linear(5, 4), nn.Tanh, Take, lambda: nn.Linear(4, 3)),
        6,
        5,
    ),
    layer(
        "Linear over two more dimensions",
        sequential(lambda: nn.Linear(5, 4), nn.Tanh, lambda: Call(lambda x: x.mean((1, 2))), lambda: nn.Linear(4, 3)),
        2,
        3,
        5,
    ),
    layer(
        "Linear on flattened positions",
        sequential(
            lambda: Call(lambda x: x.flatten(0, 1)),
            lambda: nn.Linear(5, 4),
            nn.Tanh,
            lambda: Call(lambda x: x.view(-1, 6, 4).square().mean(1)),
            lambda: nn.Linear(4, 3),
        ),
        6,
        5,
    ),
    layer(
        "Linear on flattened time-major positions",
        sequential(
            lambda: Call(lambda x: x.transpose(0, 1).flatten(0, 1)),
            lambda: nn.Linear(5, 4),
            nn.Tanh,
            lambda: Call(lambda x: x.view(6, -1, 4).square().mean(0)),
            lambda: nn.Linear(4, 3),
        ),
        6,
        5,
    ),
    layer("Linear called by keyword", Scripted, 5),
    layer("frozen first layer", lambda: frozen(mlp(), 0), 5, fit=True),
    layer("frozen bias", frozen_bias, 5),
    layer("parameters=: one pattern", mlp, 5, parameters="net.2.*"),
    layer("parameters=: weights only", mlp, 5, parameters=["*.weight"]),
    layer("parameters=: biases only", mlp, 5, parameters=["*.bias"]),
    layer("tied Linear weights with their own biases", tied_linear, 5, fit=True),
    layer("reused Linear", reused, 5),
    layer("square weight used both ways", BothWays, 5, fit=True),
    layer("square weight used both ways at 40 positions", lambda: BothWays(40), 5),
    layer("square weight and bias used both ways", BothWaysWithBias, 5),
    layer("reused Conv2d", reused_convolution, 2, 5, 4),
    # convolutions
    layer("Conv1d", over_space(lambda: nn.Conv1d(2, 4, 3), 4), 2, 9),
    layer("Conv1d, same, even kernel", over_space(lambda: EvenSame(2, 4, 4, padding="same"), 4), 2, 9),
    layer("Conv1d, same, dilation", over_space(lambda: nn.Conv1d(2, 4, 3, padding="same", dilation=2), 4), 2, 9),
    layer("Conv1d, circular", over_space(lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), 4), 2, 9),
    layer("Conv2d", over_space(lambda: nn.Conv2d(2, 4, 3), 4), 2, 6, 5, fit=True),
    layer("Conv2d without bias", over_space(lambda: nn.Conv2d(2, 4, 3, bias=False), 4), 2, 6, 5),
    layer("Conv2d, padding", over_space(lambda: nn.Conv2d(2, 4, 3, padding=(2, 1)), 4), 2, 6, 5),
    layer("Conv2d, padding valid", over_space(lambda: nn.Conv2d(2, 4, (3, 2), padding="valid"), 4), 2, 6, 5),
    layer("Conv2d, same", over_space(lambda: nn.Conv2d(2, 4, (3, 5), padding="same"), 4), 2, 6, 5),
    layer("Conv2d, stride that leaves a rest", over_space(lambda: nn.Conv2d(2, 4, 2, stride=(2, 3)), 4), 2, 7, 5),
    layer("Conv2d, dilation", over_space(lambda: nn.Conv2d(2, 4, 2, dilation=(1, 3)), 4), 2, 6, 5),
    layer("Conv2d, reflect", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 4), 2, 6, 5),
    layer("Conv2d, replicate", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), 4), 2, 6, 5),
    layer("Conv2d, circular", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), 4), 2, 6, 5),
    layer("Conv2d, groups", over_space(lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), 6), 4, 6, 5),
    layer("Conv2d, depthwise", over_space(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), 4), 4, 6, 5),
    layer("Conv2d, 1 x 1", over_space(lambda: nn.Conv2d(2, 4, 1), 4), 2, 6, 5),
    layer("Conv3d", over_space(lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=1), 4), 2, 3, 4, 5),
    layer(
        "Conv3d, groups, dilation", over_space(lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 1, 2)), 4), 2, 3, 4, 5
    ),
    layer(
        "Conv2d over frames flattened into the batch",
        sequential(
            lambda: Call(lambda x: x.flatten(0, 1)),
            lambda: nn.Conv2d(2, 4, 3),
            nn.Tanh,
            lambda: Call(lambda x: x.mean((2, 3)).view(-1, 3, 4).square().mean(1)),
            lambda: nn.Linear(4, 3),
        ),
        3,
        2,
        5,
        4,
    ),
    transposed(nn.ConvTranspose1d, 2, 5, kernel_size=3, stride=2),
    transposed(nn.ConvTranspose2d, 2, 4, 3, kernel_size=3, stride=2, padding=1, output_padding=1),
    transposed(nn.ConvTranspose2d, 2, 4, 3, kernel_size=2, groups=2, dilation=2, bias=False),
    transposed(nn.ConvTranspose3d, 2, 3, 2, 2, kernel_size=2, stride=(1, 2, 1)),
    # tables
    layer("Embedding with repeated ids", token_net(lambda: nn.Embedding(9, 4), 4), 6, high=9, fit=True),
    layer("Embedding, padding_idx", token_net(lambda: nn.Embedding(9, 4, padding_idx=2), 4), 6, high=9),
    layer("Embedding, negative padding_idx", token_net(lambda: nn.Embedding(9, 4, padding_idx=-1), 4), 6, high=9),
    layer("Embedding of one id", sequential(lambda: nn.Embedding(9, 4), lambda: nn.Linear(4, 3)), high=9),
    layer(
        "Embedding of a grid of ids",
        sequential(lambda: nn.Embedding(9, 4), lambda: Call(lambda x: x.tanh().mean((1, 2))), lambda: nn.Linear(4, 3)),
        2,
        3,
        high=9,
    ),
    layer("Embedding, sparse gradients", token_net(lambda: nn.Embedding(9, 4, sparse=True), 4), 6, high=9),
    layer("Embedding, max_norm", token_net(lambda: nn.Embedding(9, 4, max_norm=0.5), 4), 6, high=9),
    layer("EmbeddingBag, mean", Bags, 5, high=9),
    layer("EmbeddingBag, sum, padding_idx", lambda: Bags(mode="sum", padding_idx=3), 5, high=9),
    layer("EmbeddingBag, max", lambda: Bags(mode="max"), 5, high=9),
    layer("EmbeddingBag, weights", lambda: WeightedBags(mode="sum"), 5, high=9),
    layer("EmbeddingBag with offsets", FlatBags, 5, high=9),
    # normalisations
    layer(
        "LayerNorm", sequential(lambda: nn.Linear(5, 4), lambda: nn.LayerNorm(4), nn.Tanh, lambda: nn.Linear(4, 3)), 5
    ),
    layer(
        "LayerNorm over two dimensions",
        sequential(lambda: nn.LayerNorm((3, 4)), nn.Tanh, nn.Flatten, lambda: nn.Linear(12, 3)),
        3,
        4,
    ),
    layer(
        "LayerNorm over positions", sequential(lambda: nn.LayerNorm(4), nn.Tanh, Take, lambda: nn.Linear(4, 3)), 6, 4
    ),
    layer(
        "LayerNorm without bias", sequential(lambda: nn.LayerNorm(4, bias=False), nn.Tanh, lambda: nn.Linear(4, 3)), 4
    ),
    layer("RMSNorm", sequential(lambda: nn.RMSNorm(4), nn.Tanh, lambda: nn.Linear(4, 3)), 4),
    layer("GroupNorm", over_space(lambda: nn.GroupNorm(2, 4), 4), 4, 3, 5),
    layer("InstanceNorm, affine", over_space(lambda: nn.InstanceNorm2d(4, affine=True), 4), 4, 3, 5),
    layer(
        "InstanceNorm with running statistics",
        over_space(lambda: with_statistics(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), 4),
        4,
        7,
    ),
    layer(
        "BatchNorm1d",
        lambda: with_statistics(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))),
        5,
        fit=True,
    ),
    layer("BatchNorm1d over positions", over_space(lambda: with_statistics(nn.BatchNorm1d(4)), 4), 4, 6),
    layer(
        "BatchNorm2d",
        lambda: with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Pooled(4))),
        2,
        6,
        5,
        fit=True,
    ),
    layer("BatchNorm3d", over_space(lambda: with_statistics(nn.BatchNorm3d(2)), 2), 2, 3, 2, 2),
    layer("dropout", lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)), 5, fit=True),
    layer("PReLU", sequential(lambda: nn.Linear(5, 4), nn.PReLU, lambda: nn.Linear(4, 3)), 5),
    layer("PReLU by channel", over_space(lambda: nn.PReLU(4), 4), 4, 3, 2),
    Case("bias and weight in different parameter groups", lambda: Step(mlp(), two_groups=True), **both(5), fit=True),
    Case(
        "convolution with bias in another group",
        lambda: Step(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), Pooled(4)), two_groups=True),
        **both(2, 6, 5),
        fit=True,
    ),
    Case("tied weights in two groups", lambda: Step(tied_linear(), two_groups=True), **both(5), fit=True),
    Case("a parameter without entries", lambda: Step(Odd(torch.zeros(0, 3))), **both(5)),
    Case(
        "complex parameter left out",
        lambda: Step(Odd(torch.ones(3, dtype=torch.complex128))),
        **both(5),
        parameters="net.net.*",
    ),
]
