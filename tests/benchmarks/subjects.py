"""What is measured: three models with data, real where a path is given, and the fit that left their checkpoints."""

import argparse
import collections
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence

BATCH = 256
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
warnings.filterwarnings("ignore")
for _name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Classifier(pl.LightningModule):
    """A network with its loss and optimizer: by default cross-entropy, SGD."""

    def __init__(self, net, loss=F.cross_entropy, make=torch.optim.SGD, **options):
        super().__init__()
        self.net, self.loss, self.make, self.options = net, loss, make, options or {"lr": 0.05}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters(), **self.options)


def mlp(width=256, dropout=None):
    def dropped():
        return [] if dropout is None else [nn.Dropout(dropout)]

    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *dropped()),
        *(nn.Linear(width, width // 2), nn.ReLU(), *dropped(), nn.Linear(width // 2, 10)),
    )


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Block(nn.Module):
    """Attention and a feed-forward network, normalised before."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """A small Transformer encoder that classifies the mean of its tokens."""

    def __init__(self, vocabulary=5000, width=128, heads=4, layers=2, classes=4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embedding(tokens))).mean(1))


def arguments_of(doc, texts=False):
    """A parser of a benchmark's arguments that takes where its real data are."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_train, y_train, x_test, y_test; random images without it")
    if texts:
        parser.add_argument("--ag-news", help="a folder with train*.parquet and test.parquet; random tokens without it")
    return parser


def halved(path, dtype=torch.float32):
    """The test images of MNIST in one fixed order, normalised and halved in size, and their labels."""
    stored = np.load(path)
    order = np.random.default_rng(0).permutation(10_000)
    x = torch.tensor(stored["x_test"][order])[:, None].to(dtype).div(255).sub(0.1307).div(0.3081)
    return F.avg_pool2d(x, 2), torch.tensor(stored["y_test"][order]).long()


def images(path, n_train, n_queries):
    """Training examples and queries of MNIST (an npz with x_train, y_train, x_test, y_test), else random images."""
    if path is None:
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(n_train + n_queries, 1, 28, 28, generator=draw)
        y = torch.randint(0, 10, (len(x),), generator=draw)
        return TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])
    with np.load(path) as arrays:
        sides = []
        for part, count in (("train", n_train), ("test", n_queries)):
            x, y = (arrays[f"{kind}_{part}"][:count] for kind in ("x", "y"))
            sides.append(TensorDataset(torch.tensor(x)[:, None] / 255, torch.tensor(y).long()))
    return tuple(sides)


def texts(folder, n_train, n_queries, tokens=32, vocabulary=5000):
    """Training examples and queries of AG News (train*.parquet and test.parquet in a folder), else random tokens."""
    draw = torch.Generator().manual_seed(0)
    if folder is None:
        x = torch.randint(0, vocabulary, (n_train + n_queries, tokens), generator=draw)
        y = torch.randint(0, 4, (len(x),), generator=draw)
        return TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])
    import pyarrow.parquet as pq

    def read(path, count):
        table = pq.read_table(path)
        picked = torch.randperm(len(table), generator=draw)[:count].tolist()
        rows = table.take(picked).to_pylist()
        words = [re.findall(r"[a-z0-9]+", f"{row['title']} {row['description']}".lower()) for row in rows]
        return words, torch.tensor([row["label"] for row in rows])

    train, labels = read(next(Path(folder).glob("train*.parquet")), n_train)
    asked, asked_labels = read(Path(folder) / "test.parquet", n_queries)
    common = collections.Counter(word for words in train for word in words).most_common(vocabulary - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(common)}  # 0 fills up, 1 is any other word

    def encode(lines):
        return torch.tensor([([number.get(w, 1) for w in line[:tokens]] + [0] * tokens)[:tokens] for line in lines])

    return TensorDataset(encode(train), labels), TensorDataset(encode(asked), asked_labels)


@dataclass
class Subject:
    """A fitted module, its data, and who answers questions about it."""

    module: pl.LightningModule
    train: TensorDataset
    queries: TensorDataset
    attributor: object

    @property
    def checkpoints(self):
        """Those that TracInCP looks at."""
        return self.attributor.trajectory.checkpoints[1:]

    def at(self, checkpoint):
        self.module.load_state_dict(checkpoint.load().parameters)
        return self.module


def fitted(net, data, folder, checkpoints=5, momentum=0.0, batch=BATCH):
    """Train for as many epochs as there shall be checkpoints."""
    torch.manual_seed(0)
    influence = Influence(dirpath=folder)
    trainer = pl.Trainer(max_epochs=checkpoints, callbacks=[influence], **QUIET)
    module = Classifier(net, lr=0.05, momentum=momentum)
    trainer.fit(module, DataLoader(data[0], batch, shuffle=True))
    return Subject(module, *data, influence.attributor)
