"""Architectures and LightningModules nobody here wrote, with random weights: right against brute force, or refused.

Needs tests/requirements-third-party.txt. ``python tests/test_third_party.py`` prints a table with what fell to the
general path and the time against plain forward and backward passes over the same examples.
"""

import contextlib
import functools
import importlib
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Items, drawn
from fits import QUIET
from test_cases import untouched
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:(gluonts|pytorch_forecasting|chemprop|lightning|torch_geometric)"),
]

TRAIN, QUERIES, BATCH = 10, 4, 4
TIMED = 64


@dataclass(frozen=True)
class Third:
    """One model of somebody else's.

    Args:
        make: builds the LightningModule; called under a seed.
        data: (number, seed) -> dataset.
        needs: the package it comes from.
        collate: the loader's.
        loss: per-sample losses that are passed.
        says: for a refused one, fragments of the message.
        package: whose Trainer the module wants.
    """

    make: Callable[[], Any]
    data: Callable[[int, int], Any]
    needs: str | None = None
    collate: Callable[..., Any] = default_collate
    loss: Callable[..., Any] | None = None
    says: tuple[str, ...] = ()
    package: str = "pytorch_lightning"


class Around(pl.LightningModule):
    """The ten lines around a model that a user writes."""

    def __init__(self, net, loss=None):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        if self.loss is None:
            return self.net(**batch).loss
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(model, config, **settings):
    transformers = importlib.import_module("transformers")
    return Around(getattr(transformers, model)(getattr(transformers, config)(**settings)))


def bert(model="BertForSequenceClassification"):
    return hugging_face(
        model,
        "BertConfig",
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )


def sentences(n, seed, low=3, high=9):
    g = drawn(seed)
    lengths = torch.randint(low, high, (n,), generator=g).tolist()
    ids = [torch.randint(1, 50, (length,), generator=g) for length in lengths]
    return Items([{"input_ids": i, "labels": int(y)} for i, y in zip(ids, torch.randint(3, (n,), generator=g))])


def padded(items):
    """What a tokenizer's collator does: ids padded to the longest, with a mask."""
    ids = [item["input_ids"] for item in items]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items])
    return batch


def gpt2():
    return hugging_face("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def llama():
    return hugging_face(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )


def t5():
    return hugging_face(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


def vit():
    return hugging_face(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )


def texts(n, seed):
    ids = torch.randint(1, 50, (n, 8), generator=drawn(seed))
    return Items([{"input_ids": i, "labels": i} for i in ids])


def pairs(n, seed):
    ids = torch.randint(1, 50, (n, 14), generator=drawn(seed))
    return Items([{"input_ids": i[:8], "labels": i[8:]} for i in ids])


def language(items):
    """A language model's collator: what was padded is no label."""
    batch = padded([{"input_ids": item["input_ids"]} for item in items])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def token_mean(module, batch):
    """Per-sample losses of a language model: each text's own mean over its tokens."""
    logits = module.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def pictures(n, seed):
    g = drawn(seed)
    pixels, labels = torch.randn(n, 1, 8, 8, generator=g), torch.randint(3, (n,), generator=g)
    return Items([{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels)])


# ---- vision ----------------------------------------------------------------------------------------------------------


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def labelled_digits(n, seed):
    chosen = torch.randperm(1797, generator=drawn(seed))[:n]
    images, labels = digits()
    return Items([(images[i], labels[i]) for i in chosen])


def masked_digits(n, seed):
    """Each digit with the map of its dark, grey and bright pixels."""
    return Items([(x, (x[0] * 2.99).long()) for x, _ in labelled_digits(n, seed).items])


def pair(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.one, self.two = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.Conv2d(outside, outside, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.short = short if stride > 1 or inside != outside else nn.Identity()

    def forward(self, x):
        h = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        h += self.short(x)
        return self.relu(h)


def resnet(widths=(8, 8, 16, 16)):
    stem = [nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    stages = [
        Block(inside if first else outside, outside, 1 + (first and i > 0))
        for i, (inside, outside) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        for first in (True, False)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return Around(nn.Sequential(*stem, *stages, *head), pair)


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()

        def double(inside, outside):
            convolutions = [nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)]
            return nn.Sequential(*[m for c in convolutions for m in (c, nn.BatchNorm2d(outside), nn.ReLU(True))])

        self.down1, self.down2, self.bottom = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.mix2, self.mix1 = double(4 * width, 2 * width), double(2 * width, width)
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        h = self.up2(self.bottom(F.max_pool2d(two, 2)))
        h = self.up1(self.mix2(torch.cat([two, h], 1)))
        return self.out(self.mix1(torch.cat([one, h], 1)))


# ---- graphs ----------------------------------------------------------------------------------------------------------


def graph(nodes, label, generator):
    from torch_geometric.data import Data

    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    return Data(x=torch.randn(nodes, 4, generator=generator), edge_index=edges, y=torch.tensor([label]))


def graphs(n, seed, sizes=(3, 4, 5, 6, 7)):
    g = drawn(seed)
    return Items([graph(sizes[i * i % len(sizes)], i % 3, g) for i in range(n)])


def many(items):
    from torch_geometric.data import Batch

    return Batch.from_data_list(items)


def graph_network(layer="GCNConv", in_place=False, **options):
    from torch_geometric import nn as gnn

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = getattr(gnn, layer)(4, 8, **options), getattr(gnn, layer)(8, 8, **options)
            self.head = nn.Linear(8, 3)

        def forward(self, data):
            h = F.relu(self.one(data.x, data.edge_index))
            if in_place:
                data.x = h
            h = self.two(h, data.edge_index)
            return self.head(gnn.global_mean_pool(h, data.batch))

    return Around(Graph(), lambda net, data: F.cross_entropy(net(data), data.y))


MOLECULES = ("CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCC", "C1CCCCC1", "CC(C)O", "c1ccncc1", "CCOC", "O=C=O", "CC#N")


def molecules(n, seed):
    from chemprop.data import MoleculeDatapoint, MoleculeDataset

    g = drawn(seed)
    chosen, targets = torch.randint(len(MOLECULES), (n,), generator=g), torch.randn(n, 1, generator=g)
    points = [MoleculeDatapoint.from_smi(MOLECULES[i], y.numpy()) for i, y in zip(chosen, targets, strict=True)]
    return MoleculeDataset(points)


def chemprop_batch(items):
    from chemprop.data import collate_batch

    return collate_batch(items)


def chemprop_mpnn():
    from chemprop import models
    from chemprop import nn as parts

    passing = parts.BondMessagePassing(d_h=12, depth=2)
    head = parts.RegressionFFN(input_dim=12, hidden_dim=8)
    return models.MPNN(passing, parts.MeanAggregation(), head, batch_norm=True, warmup_epochs=1)


# ---- time series -----------------------------------------------------------------------------------------------------


def series(n, seed, encoder=8, horizon=3):
    """Windows of a few short series, one starting at each step."""
    import pandas
    from pytorch_forecasting import TimeSeriesDataSet

    length = encoder + horizon + n - 1
    values = torch.randn(length, generator=drawn(seed)).cumsum(0)
    frame = pandas.DataFrame({"time": range(length), "value": values.numpy(), "group": "a"})
    frame["day"] = (frame["time"] % 3).astype(str)
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=encoder,
        max_prediction_length=horizon,
        time_varying_known_categoricals=["day"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )


def horizons(n, seed):
    found = series(n, seed)
    assert len(found) == n
    return found


def forecasting_batch(items):
    from pytorch_forecasting import TimeSeriesDataSet

    return TimeSeriesDataSet._collate_fn(items)


def temporal_fusion():
    from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer

    return TemporalFusionTransformer.from_dataset(
        series(TRAIN, 1),
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        loss=QuantileLoss([0.1, 0.5, 0.9]),
        optimizer="sgd",
        learning_rate=0.05,
    )


def deep_ar():
    from gluonts.torch.model.deepar import DeepARLightningModule

    return DeepARLightningModule(
        {
            "freq": "D",
            "context_length": 8,
            "prediction_length": 3,
            "num_feat_dynamic_real": 1,
            "num_feat_static_real": 1,
            "num_feat_static_cat": 1,
            "cardinality": [3],
            "hidden_size": 8,
            "lags_seq": [1, 2],
        }
    )


def gluonts_series(n, seed):
    g = drawn(seed)

    def one(i):
        return {
            "feat_static_cat": torch.tensor([i % 3]),
            "feat_static_real": torch.randn(1, generator=g),
            "past_time_feat": torch.randn(10, 1, generator=g),
            "past_target": torch.randn(10, generator=g).exp(),
            "past_observed_values": torch.ones(10),
            "future_time_feat": torch.randn(3, 1, generator=g),
            "future_target": torch.randn(3, generator=g).exp(),
            "future_observed_values": torch.ones(3),
        }

    return Items([one(i) for i in range(n)])


def n_beats():
    from darts.models.forecasting.nbeats import _NBEATSModule

    blocks = {"num_stacks": 1, "num_blocks": 1, "num_layers": 2, "layer_widths": [6], "expansion_coefficient_dim": 3}
    return _NBEATSModule(
        **blocks,
        input_dim=1,
        output_dim=1,
        nr_params=1,
        generic_architecture=True,
        trend_polynomial_degree=2,
        batch_norm=False,
        dropout=0.0,
        activation="ReLU",
        input_chunk_length=8,
        output_chunk_length=3,
        train_sample_shape=None,
        torch_metrics=None,
        likelihood=None,
        loss_fn=nn.MSELoss(),
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.05},
    )


def chunks(n, seed):
    from darts.utils.data.torch_datasets.utils import TorchTrainingSample

    g = drawn(seed)
    past, future = torch.randn(n, 8, 1, generator=g).numpy(), torch.randn(n, 3, 1, generator=g).numpy()
    return Items([TorchTrainingSample(past_target=p, future_target=f) for p, f in zip(past, future, strict=True)])


def chunks_batch(items):
    from darts.utils.data.torch_datasets.utils import _batch_collate_fn_train

    return _batch_collate_fn_train(items)


def windows_of_series():
    from neuralforecast.models import MLP

    return MLP(h=3, input_size=8, hidden_size=6, num_layers=1, windows_batch_size=4, max_steps=100, alias="a")


def whole_series(n, seed):
    g = drawn(seed)
    return Items([torch.stack([torch.randn(24, generator=g), torch.ones(24)]) for _ in range(n)])


def whole_series_batch(items):
    import pandas

    return {"temporal": torch.stack(items), "temporal_cols": pandas.Index(["y", "available_mask"]), "y_idx": 0}


CASES = {
    "BERT, padded batches": Third(bert, sentences, "transformers", padded),
    "GPT-2, texts of one length": Third(gpt2, texts, "transformers"),
    "GPT-2, padded texts, loss=": Third(gpt2, sentences, "transformers", language, token_mean),
    "Llama": Third(llama, texts, "transformers"),
    "T5": Third(t5, pairs, "transformers"),
    "ViT": Third(vit, pictures, "transformers"),
    "ResNet-18 shape": Third(resnet, labelled_digits, "sklearn"),
    "U-Net": Third(lambda: Around(UNet(), pair), masked_digits, "sklearn"),
    "graph convolutions": Third(graph_network, graphs, "torch_geometric", many),
    "graph attention": Third(lambda: graph_network("GATConv", heads=1), graphs, "torch_geometric", many),
    "a graph changed by the step": Third(lambda: graph_network(in_place=True), graphs, "torch_geometric", many),
    "chemprop MPNN": Third(chemprop_mpnn, molecules, "chemprop", chemprop_batch, package="lightning.pytorch"),
    "pytorch-forecasting TFT": Third(
        temporal_fusion, horizons, "pytorch_forecasting", forecasting_batch, package="lightning.pytorch"
    ),
    "GluonTS DeepAR": Third(deep_ar, gluonts_series, "gluonts", package="lightning.pytorch"),
    "darts N-BEATS": Third(n_beats, chunks, "darts", chunks_batch),
    "neuralforecast MLP": Third(  # its step draws windows of the series
        windows_of_series, whole_series, "neuralforecast", whole_series_batch, says=("random numbers", "loss=")
    ),
}


class Asked:
    """A case that was trained for two epochs, in the dataset's order."""

    def __init__(self, case, folder):
        if case.needs is not None:
            pytest.importorskip(case.needs)
        self.case, self.package = case, importlib.import_module(case.package)
        torch.manual_seed(0)
        self.train, self.queries = case.data(TRAIN, 1), case.data(QUERIES, 2)
        self.module = case.make()
        self.rates = []
        self.trainer = self.fitted(folder)
        self.trajectory = Trajectory.load(folder)
        self.loader = self.loaded(self.train)
        self.attributor = self.ask(self.loader, self.trajectory)

    def loaded(self, data, batch=BATCH):
        return DataLoader(data, batch, shuffle=False, collate_fn=self.case.collate)

    def ask(self, loader, trajectory=None):
        return Attributor(self.module, loader, trajectory, self.trainer, loader.batch_size, loss=self.case.loss)

    def fitted(self, folder):
        rates = self.rates

        class Rates(self.package.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                rates.append(optimizer.param_groups[0]["lr"])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.package.Trainer(**QUIET, max_epochs=2, callbacks=[Influence(dirpath=folder), Rates()])
            trainer.fit(self.module, self.loaded(self.train))
        return trainer

    @property
    def names(self):
        return [name for name, p in self.module.named_parameters() if p.requires_grad]

    def ones(self, data):
        return [self.case.collate([data[i]]) for i in range(len(data))]

    def windows(self):
        """(weights, [1, train]) of both epochs: the rate of the step that took an example / the size of its batch."""
        states = [checkpoint.load() for checkpoint in self.trajectory.checkpoints][1:]
        batches = (TRAIN + BATCH - 1) // BATCH
        assert len(states) == 2
        assert len(self.rates) == 2 * batches
        for epoch, state in enumerate(states):
            rates = [self.rates[epoch * batches + i // BATCH] for i in range(TRAIN)]
            sizes = [min(BATCH, TRAIN - i // BATCH * BATCH) for i in range(TRAIN)]
            share = torch.tensor([[rate / size for rate, size in zip(rates, sizes, strict=True)]], dtype=torch.float64)
            yield {**state.parameters, **state.buffers}, share

    def expected(self):
        self.trainer.training = True  # pytorch-forecasting has no loss otherwise
        train, queries = self.ones(self.train), self.ones(self.queries)
        windows = list(self.windows())
        return {
            "tracin": oracles.tracin(self.module, train, queries, self.names, windows, self.case.loss),
            "self": oracles.tracin_self(self.module, train, self.names, windows, self.case.loss),
        }

    def check(self):
        with untouched(self.module, self.trainer):
            scores = self.attributor.score(TracInCP(), self.queries)
            actual = {"tracin": scores.values, "self": self.attributor.self_influence(TracInCP()).values}
        for question, expected in self.expected().items():
            oracles.assert_scores(actual[question], expected, 1e-4)
        return next(note for note in scores.notes if "computed the fast way" in note)

    # ---- the cost ------------------------------------------------------------------------------------------------

    def times(self):
        """Seconds for 64 examples and 16 queries: plain passes, the first question, the second question."""
        loader, asked = self.loaded(self.case.data(TIMED, 3), 32), self.loaded(self.case.data(TIMED // 4, 4), 32)
        twin = oracles.quiet_copy(self.module)

        def plain():
            for batch in (*loader, *asked):
                twin.zero_grad()
                loss = oracles.one_loss(twin, batch, self.case.loss)
                loss.backward()

        attributor = self.ask(loader)
        first = seconds(lambda: attributor.score(GradientDot(), asked))
        again = min(seconds(lambda: attributor.score(GradientDot(), asked)) for _ in range(3))
        return min(seconds(plain) for _ in range(3)), first, again


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


RIGHT = [name for name, case in CASES.items() if not case.says]
REFUSED = [name for name, case in CASES.items() if case.says]


@pytest.mark.parametrize("name", RIGHT)
def test_scores_equal_brute_force(name, tmp_path):
    Asked(CASES[name], tmp_path).check()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_with_cause_and_way_out(name, tmp_path):
    asked = Asked(CASES[name], tmp_path)
    with untouched(asked.module), pytest.raises(ValueError, match="loss=") as caught:
        asked.attributor.score(TracInCP(), asked.queries)
    for fragment in asked.case.says:
        assert fragment in str(caught.value)


def test_graphs_whose_sizes_the_self_check_did_not_meet_are_right(tmp_path):
    """Of the same size where the self-check looks, of two others with the same mean elsewhere."""
    pytest.importorskip("torch_geometric")
    looked_at = {0, 21, 43, 6, 19, 32, 45, 58, *range(0, 64, 8), *range(7, 64, 8)}
    sizes = [6] * 64
    for first in range(0, 64, 8):
        others = [i for i in range(first, first + 8) if i not in looked_at]
        for small, large in zip(others[::2], others[1::2], strict=False):
            sizes[small], sizes[large] = 4, 8
    g = drawn(1)
    data = Items([graph(size, i % 3, g) for i, size in enumerate(sizes)])
    torch.manual_seed(0)
    module = graph_network()
    attributor = Attributor(module, DataLoader(data, 8, collate_fn=many), batch_size=8)
    names = [name for name, _ in module.named_parameters()]
    ones = [many([data[i]]) for i in range(64)]
    actual = attributor.self_influence(GradientDot()).values
    oracles.assert_scores(actual, oracles.squared(oracles.rows(module, ones, names)), 1e-4)


def outcome(case):
    """Right or refused, what fell to the general path, times of plain passes: in words, for the table."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(case, Path(folder))
        try:
            note = asked.check()
        except (ValueError, TypeError) as error:
            return f"refused: {error} | |" if case.says else f"unexpected: {error} | |"
        plain, first, again = asked.times()
        return f"right | {note} | {again / plain:.1f} (first question {first / plain:.1f}; plain {1000 * plain:.0f} ms)"


def table(wanted):
    """Markdown: every case with its outcome."""
    yield "| case | outcome | general path | times plain passes |"
    yield "| --- | --- | --- | --- |"
    for name, case in CASES.items():
        if wanted in name:
            with contextlib.redirect_stdout(sys.stderr):
                line = outcome(case)
            yield f"| {name} | {line} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for line in table(sys.argv[1] if len(sys.argv) > 1 else ""):
        print(line, flush=True)
