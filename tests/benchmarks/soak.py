"""Ordinary networks in float32, none of which may be refused: the spot checks see rounding at kinks, and no more.

python tests/benchmarks/soak.py                                 # 20 networks, 5 seeds, 5,000 examples: an hour
python tests/benchmarks/soak.py --seeds 1 --examples 300 --every 8   # minutes; more checks for each example
"""

import argparse
import tempfile
import time

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, Encoder
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence, TracInCP
from lightning_influence.gradients.guard import Guard

SIDE, TIME, WORDS, CLASSES = 12, 10, 50, 5


class Residual(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, inner, after=None):
        super().__init__()
        self.inner, self.after = inner, after or nn.Identity()

    def forward(self, x):
        return self.after(x + self.inner(x))


class Last(nn.Module):
    """A recurrent layer whose states are read at the end, or by their maximum over time."""

    def __init__(self, layer, read, width):
        super().__init__()
        self.embed, self.layer, self.read, self.head = nn.Embedding(WORDS, 16), layer, read, nn.Linear(width, CLASSES)

    def forward(self, x):
        out = self.layer(self.embed(x))
        return self.head(self.read(out[0] if isinstance(out, tuple) else out))


class Branches(nn.Module):
    """Three kernels next to each other, as in Inception."""

    def __init__(self, width):
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(width, 6, k, padding=k // 2) for k in (1, 3, 5))

    def forward(self, x):
        return torch.cat([F.relu(path(x)) for path in self.paths], 1)


class Causal(nn.Module):
    """A decoder that predicts from its last token."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, 16), nn.Parameter(0.1 * torch.randn(TIME, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, CLASSES)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(self.embed(x) + self.place, mask=mask)[:, -1])


class Patches(nn.Module):
    """A vision transformer."""

    def __init__(self):
        super().__init__()
        self.cut, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
        self.place = nn.Parameter(0.1 * torch.randn(1, 10, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, CLASSES)

    def forward(self, x):
        h = self.cut(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.place
        return self.head(self.layers(h)[:, 0])


def conv(a, b, stride=1, norm=nn.BatchNorm2d, groups=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, groups=groups, bias=False), norm(b))


def block(width, norm=nn.BatchNorm2d):
    inner = nn.Sequential(*conv(width, width, norm=norm), nn.ReLU(), *conv(width, width, norm=norm))
    return Residual(inner, nn.ReLU())


def head(width, *before):
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def group_norm(width):
    return nn.GroupNorm(4, width)


def dense(*widths, act=nn.ReLU, norm=False):
    layers = [nn.Flatten()]
    for a, b in zip((3 * SIDE * SIDE, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def lstm(**options):
    return nn.LSTM(16, 16, batch_first=True, **options)


def text_conv():
    return nn.Sequential(
        nn.Embedding(WORDS, 16), Turn(), nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool1d(1),
        nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


class Turn(nn.Module):
    """Channels before time."""

    def forward(self, x):
        return x.transpose(1, 2)


def last(x):
    return x[:, -1]


def largest(x):
    return x.amax(1)


IMAGES = {
    "MLP, ReLU": lambda: dense(64, 32),
    "MLP, GELU, wide": lambda: dense(256, act=nn.GELU),
    "MLP, BatchNorm": lambda: dense(64, 64, norm=True),
    "LeNet, max pooling": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    ),
    "VGG, BatchNorm": lambda: head(
        24,
        *(*conv(3, 12), nn.ReLU(), *conv(12, 12), nn.ReLU(), nn.MaxPool2d(2)),
        *(*conv(12, 24), nn.ReLU(), nn.MaxPool2d(2)),
    ),
    "ResNet": lambda: head(16, *conv(3, 16), nn.ReLU(), block(16), block(16)),
    "ResNet, deep": lambda: head(12, *conv(3, 12), nn.ReLU(), nn.MaxPool2d(2), *[block(12) for _ in range(6)]),
    "ResNet, GroupNorm": lambda: head(16, *conv(3, 16, norm=group_norm), nn.ReLU(), block(16, norm=group_norm)),
    "MobileNet, ReLU6": lambda: head(
        24, *conv(3, 12, 2), nn.ReLU6(), *conv(12, 12, groups=12), nn.ReLU6(), nn.Conv2d(12, 24, 1), nn.ReLU6()
    ),
    "Inception": lambda: head(18, Branches(3), nn.MaxPool2d(2), Branches(18)),
    "ConvNeXt": lambda: head(
        16, nn.Conv2d(3, 16, 2, 2), *[Residual(nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(1, 16), nn.Conv2d(16, 64, 1), nn.GELU(),
            nn.Conv2d(64, 16, 1),
        )) for _ in range(3)]
    ),
    "SiLU, LeakyReLU, average pooling": lambda: head(
        16, *conv(3, 8), nn.SiLU(), nn.AvgPool2d(2), *conv(8, 16), nn.LeakyReLU()
    ),
    "Vision transformer": Patches,
}  # fmt: skip
TEXTS = {
    "Encoder, pre-norm": lambda: Encoder(WORDS, 32, 2, 2, CLASSES),
    "Decoder, causal": Causal,
    "LSTM": lambda: Last(lstm(), last, 16),
    "LSTM, both directions, maximum": lambda: Last(lstm(bidirectional=True), largest, 32),
    "GRU, two layers": lambda: Last(nn.GRU(16, 16, 2, batch_first=True), last, 16),
    "RNN, ReLU": lambda: Last(nn.RNN(16, 16, nonlinearity="relu", batch_first=True), last, 16),
    "Convolution over words": text_conv,
}
NETWORKS = {**IMAGES, **TEXTS}


def data(name, examples, seed):
    """Labels that can be learnt, up to a tenth."""
    g = torch.Generator().manual_seed(seed)
    if name in TEXTS:
        x = torch.randint(WORDS, (examples, TIME), generator=g)
        y = (x < 10).sum(1) % CLASSES
    else:
        x = torch.rand(examples, 3, SIDE, SIDE, generator=g)
        x[torch.rand(examples, generator=g) < 0.3, :, :4] = 0  # plain regions
        y = (x[:, 0, 4:].mean((1, 2)) * 60).long() % CLASSES
    noise = torch.rand(examples, generator=g) < 0.1
    y[noise] = torch.randint(CLASSES, (int(noise.sum()),), generator=g)
    return TensorDataset(x, y)


def soaked(name, seed, examples, epochs):
    """Score a network; returns what was refused (or None), and the note about repeated checks."""
    torch.manual_seed(seed)
    train = data(name, examples, seed)
    with tempfile.TemporaryDirectory() as folder:
        influence = Influence(dirpath=folder)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[influence], **QUIET)
        # It fits fast, so that many examples are nearly certain.
        module = Classifier(NETWORKS[name](), make=torch.optim.AdamW, lr=3e-3)
        trainer.fit(module, DataLoader(train, 50, shuffle=True))
        try:
            scores = influence.attributor.self_influence(TracInCP(units="paper"))
        except ValueError as error:
            return str(error), ""
    return None, next((n for n in scores.notes if "spot checks" in n), "")


def more_checks(every):
    """Check one example in ``every`` of all blocks at all checkpoints, not of the first pass alone."""
    choose = Guard.choose

    def chosen(self, block):
        rows, new = choose(self, block)
        return {**dict.fromkeys(range(0, block.size, every)), **rows}, new

    Guard.choose = chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, help="also check one example in this many at all checkpoints")
    parser.add_argument("--only", help="the networks whose names hold this")
    arguments = parser.parse_args()
    refused, runs = 0, 0
    if arguments.every:
        more_checks(arguments.every)
    for name in NETWORKS:
        if arguments.only is None or arguments.only in name:
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                start = time.perf_counter()
                error, note = soaked(name, seed, arguments.examples, arguments.epochs)
                refused, runs = refused + (error is not None), runs + 1
                took = time.perf_counter() - start
                print(f"{name:34} seed {seed} {took:6.1f} s  {error or note or 'no check failed'}", flush=True)
    print(f"{refused} false refusals in {runs} runs of {arguments.examples:,} examples")


if __name__ == "__main__":
    main()
