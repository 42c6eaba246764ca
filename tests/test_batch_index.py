"""Losses that depend on ``batch_idx``: every method against loops that pass each step's own index, or refused."""

import contextlib
import functools
import json
import math
import re
import warnings
import zlib

import oracles_dynamic
import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch
from capture.test_resume import SaveAt
from cases_index import DEPENDENT, INDEPENDENT
from fits import QUIET, Indexed, Net, Stream, fit, loader
from oracles import assert_scores
from replay.runs import Run
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    ConjugateGradient,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    MissingEvidence,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    Trajectory,
)
from lightning_influence.module.step import reads_index
from lightning_influence.module.watched_index import WatchedIndex, differing_indices
from lightning_influence.replay.replay import DriftError

N, QUERIES = 11, 4


class Losses(nn.Module):
    """Per-sample losses [example] of two networks at an index."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        self.b = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x, y, index):
        first = F.cross_entropy(self.a(x), y, reduction="none")
        if self.kind == "alternates":
            return first if index % 2 == 0 else (self.b(x) - x[:, :3]).square().sum(1)
        both = first + F.cross_entropy(self.b(x), y, reduction="none")
        if self.kind == "rises":
            return both * (index + 1) / 2
        if self.kind == "every second":
            return both + (sum(p.square().sum() for p in self.parameters()) if index % 2 == 1 else 0.0)
        assert self.kind == "last"
        return both * (3.0 if index == 2 else 1.0)


class Module(pl.LightningModule):
    def __init__(self, kind, lr=0.1, **settings):
        super().__init__()
        self.net, self.lr, self.settings, self.seen = Losses(kind).double(), lr, settings, []

    def training_step(self, batch, batch_idx):
        x, y, ids = batch
        if self.trainer.training:
            self.seen.append((ids.tolist(), int(batch_idx), self.current_epoch))
        return self.net(x, y, batch_idx).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, **self.settings)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def data(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (count,), generator=draw), torch.arange(count))


TRAIN, ASKED = data(N, 0), data(QUERIES, 1)


class Fitted:
    """A fit on shuffled batches of 4, and the oracle's copy of it."""

    def __init__(self, folder, kind, epochs=2, divisor=1, sampler=None, settings=None, make=Module, **capture):
        torch.manual_seed(5)
        self.module = make(kind, **(settings or {}))
        start = {n: p.detach().clone() for n, p in self.module.net.named_parameters()}
        influence = Influence(dirpath=folder, max_cost=1e9, **capture)
        options = {"max_epochs": epochs, "callbacks": [influence], "accumulate_grad_batches": divisor}
        self.trainer = pl.Trainer(**{**QUIET, **options})
        self.trainer.fit(self.module, DataLoader(TRAIN, 4, shuffle=sampler is None, sampler=sampler))
        self.influence, self.trajectory = influence, influence.trajectory
        windows, rates = [], []
        for epoch in range(epochs):
            of_epoch = [self.batch(ids, index) for ids, index, e in self.module.seen if e == epoch]
            windows += [of_epoch[k : k + divisor] for k in range(0, len(of_epoch), divisor)]
            rates += [[self.module.lr * 0.7**epoch]] * -(-len(of_epoch) // divisor)
        groups = [(list(start), self.module.settings)]
        self.run = Run(Losses(kind).double(), start, windows, rates, groups, "SGD", divisor)
        self.run.losses = lambda module, params, batch: oracles_dynamic.call(module, params, *batch)

    def batch(self, ids, index):
        x, y, _ = TRAIN[ids]
        return ids, (x, y, index), None

    def attributor(self, **options):
        return Attributor(self.module, TRAIN, self.trajectory, self.trainer, **options)

    def query_losses(self, module, params, index=0):
        return oracles_dynamic.call(module, params, *self.queries[:2], index)

    @property
    def queries(self):
        return *ASKED.tensors[:2], 0


# ---- replays, trackers and retraining --------------------------------------------------------------------------------

MOMENTUM = {"momentum": 0.8, "weight_decay": 0.05}
KINDS = [("rises", MOMENTUM), ("every second", {}), ("alternates", MOMENTUM), ("last", MOMENTUM)]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_hydra_and_leave_one_out_follow_the_index(kind, settings, tmp_path):
    fitted = Fitted(tmp_path, kind, settings=settings, divisor=2 if kind == "rises" else 1)
    asked = fitted.attributor(refit=Refit(seeds="fixed"))
    scores = asked.score(HyDRA(), ASKED)
    assert_scores(scores.values, oracles_dynamic.influence(fitted.run, fitted.query_losses, N), 1e-8)
    assert any("depends on `batch_idx`" in note and "that at `batch_idx=0`" in note for note in scores.notes)
    without = [oracles_dynamic.losses_at(fitted.run, fitted.query_losses, w) for w in 1 - torch.eye(N).double()]
    full = oracles_dynamic.losses_at(fitted.run, fitted.query_losses, torch.ones(N).double())
    found = asked.score(LeaveOneOut(), ASKED)
    assert_scores(found.values, (torch.stack(without) - full).T, 1e-8)
    assert any("depends on `batch_idx`" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["rises", "alternates"])
def test_tracin_follows_the_index(kind, tmp_path):
    fitted = Fitted(tmp_path, kind, settings=MOMENTUM if kind == "rises" else {}, divisor=2 if kind == "rises" else 1)
    expected = oracles_dynamic.tracin(fitted.run, fitted.run.losses, fitted.queries, N)
    assert_scores(fitted.attributor().score(TracIn(), ASKED).values, expected, 1e-9)
    itself = oracles_dynamic.tracin(fitted.run, fitted.run.losses, None, N)
    found = fitted.attributor().self_influence(TracIn())
    assert_scores(found.values, itself, 1e-9)
    assert any("also as its own query" in note for note in found.notes)


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("kind", ["rises", "alternates"])
def test_hydra_during_the_fit_follows_the_index(kind, hessian, tmp_path):
    method = HyDRA.during_fit(hessian=hessian)
    fitted = Fitted(tmp_path, kind, settings=MOMENTUM, methods=[method], queries=ASKED)
    found = fitted.influence.scores["HyDRA"]
    if hessian:
        expected = oracles_dynamic.influence(fitted.run, fitted.query_losses, N)
    else:
        expected = fitted.attributor().score(HyDRA(hessian=False), ASKED).values.double()
    assert_scores(found.values, expected, 1e-8)


# ---- TracInCP --------------------------------------------------------------------------------------------------------


def tracin_cp(fitted, momentum=0.0, itself=False, queries=lambda k: 0):
    """[query, train], or [train]: a loop over the visits of each window; ``queries``: their index at checkpoint k."""
    run, twin = fitted.run, fitted.run.module
    total = torch.zeros(QUERIES, N, dtype=torch.float64)[0 if itself else slice(None)]
    steps = [c.step for c in fitted.trajectory.checkpoints]
    for k in range(1, len(steps)):
        state = fitted.trajectory.checkpoints[k].load().parameters
        params = {n.removeprefix("net."): p.clone().requires_grad_() for n, p in state.items()}
        asked = oracles_dynamic.rows_of(fitted.query_losses(twin, params, queries(k)), params)
        for made in range(steps[k - 1], steps[k]):
            for ids, batch, _ in run.windows[made]:
                rows = oracles_dynamic.rows_of(run.losses(twin, params, batch), params)
                left = rows if itself else asked
                products = sum(left[n].flatten(1) @ rows[n].flatten(1).T for n in rows)
                rate = run.rates[made][0] / (1 - momentum) / run.divisor / len(ids)
                for j, i in enumerate(ids):
                    total[..., i] += rate * (products[j, j] if itself else products[:, j])
    return total


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("alternates", {"epochs": 4, "every_n_epochs": 2}),
        ("rises", {"epochs": 3, "every_n_epochs": 3, "divisor": 2, "settings": {"momentum": 0.5}}),
        ("last", {"epochs": 2, "sampler": RandomSampler(TRAIN, replacement=True, num_samples=N)}),
        ("every second", {"epochs": 2, "every_n_train_steps": 4}),
    ],
)
def test_tracin_cp_sums_over_the_indices_that_an_example_met(kind, options, tmp_path):
    fitted = Fitted(tmp_path, kind, **options)
    momentum = options.get("settings", {}).get("momentum", 0.0)
    for batch_size in (None, 2):
        attributor = fitted.attributor(batch_size=batch_size)
        scores = attributor.score(TracInCP(), ASKED)
        assert_scores(scores.values, tracin_cp(fitted, momentum), 1e-10)
        assert sum("depends on `batch_idx`" in note for note in scores.notes) == 1
    assert_scores(attributor.self_influence(TracInCP()).values, tracin_cp(fitted, momentum, itself=True), 1e-10)
    (top,) = attributor.score(TracInCP(), ASKED, top_k=2, aggregate="mean").proponents(2).train_ids
    assert top.tolist() == tracin_cp(fitted, momentum).mean(0).topk(2).indices.tolist()


@pytest.mark.slow
def test_tracin_cp_ranks_the_examples_of_odd_batches_as_leaving_them_out_does(tmp_path):
    class Alternating(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 3).double()

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self.net(x), x[:, :3]) if batch_idx % 2 else F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=draw, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=draw, dtype=torch.float64)).argmax(1)
    train, queries = TensorDataset(x[:80], y[:80]), TensorDataset(x[80:], y[80:])
    torch.manual_seed(0)
    module, influence = Alternating(), Influence(dirpath=tmp_path)
    pl.Trainer(**QUIET, max_epochs=4, callbacks=[influence]).fit(module, DataLoader(train, 8))
    attributor = Attributor(module, train, influence.trajectory, refit=Refit(seeds="fixed"))
    odd = torch.arange(80) // 8 % 2 == 1
    found = [attributor.score(method, queries).values[:, odd] for method in (TracInCP(), LeaveOneOut())]
    ranks = [v.argsort(1).argsort(1).double() for v in found]
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    assert torch.stack(pairs).mean() > 0.85


class Warmup(Module):
    """The loss rises with the index in the first epoch only."""

    def training_step(self, batch, batch_idx):
        index = batch_idx if self.current_epoch == 0 else 1
        self.seen.append((batch[2].tolist(), int(index), self.current_epoch))
        return self.net(*batch[:2], index).mean()


def test_a_dependence_in_an_early_epoch_only_is_found_at_its_checkpoint(tmp_path):
    fitted = Fitted(tmp_path, "rises", make=Warmup)
    scores = fitted.attributor().score(TracInCP(), ASKED)
    assert_scores(scores.values, tracin_cp(fitted, queries=lambda k: int(k > 1)), 1e-10)
    assert any("depends on `batch_idx`" in note for note in scores.notes)
    assert not fitted.attributor().score(GradientDot(), ASKED).notes[0].startswith("The loss depends")


class ByClock(Module):
    """The loss alternates with the number of the step, or rises with that of the epoch."""

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[2].tolist(), batch_idx, self.current_epoch))
        number = self.global_step if self.net.kind == "alternates" else self.current_epoch
        return self.net(*batch[:2], number).mean()


@pytest.mark.parametrize(
    ("kind", "every", "expected"),
    [
        ("alternates", 1, r"depends on `global_step` \(it differs between 0 and [135]\)"),
        ("rises", 2, r"depends on `current_epoch` \(it differs between 0 and 1\)"),
        ("rises", 1, None),
    ],
)
def test_tracin_cp_notes_a_loss_that_differs_among_the_steps_of_a_checkpoint(kind, every, expected, tmp_path):
    fitted = Fitted(tmp_path, kind, epochs=2, make=ByClock, every_n_epochs=every)
    loop = fitted.trainer.fit_loop
    before = loop.epoch_loop.global_step, loop.epoch_progress.current.completed
    notes = fitted.attributor().score(TracInCP(), ASKED).notes
    found = [note for note in notes if "`TracIn()` and `HyDRA()` follow every step" in note]
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])
    assert not any("batch_idx" in note for note in notes)
    assert (loop.epoch_loop.global_step, loop.epoch_progress.current.completed) == before


class ByHook(Module):
    """The step reads what a hook was given."""

    def on_train_batch_start(self, batch, batch_idx):
        self.number, self.unread = batch_idx, batch_idx + 1

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[2].tolist(), int(self.number), self.current_epoch))
        return self.net(*batch[:2], self.number).mean()


def test_an_index_that_a_hook_keeps_is_noted(tmp_path):
    fitted = Fitted(tmp_path, "rises", make=ByHook)
    notes = fitted.attributor().score(TracInCP(), ASKED).notes
    assert any(note.startswith("`on_train_batch_start` sets `number`, and is not called here") for note in notes)
    with pytest.raises(DriftError) as caught:
        fitted.attributor().score(TracIn(), ASKED)
    assert "`TracInCP()` repeats no step, but it is right only if data and loss" in str(caught.value)
    plain = Fitted(tmp_path / "plain", "last")
    assert not any("hook" in note or "_start" in note for note in plain.attributor().score(TracInCP(), ASKED).notes)


# ---- refusals --------------------------------------------------------------------------------------------------------


CANNOT = [
    GradientDot(),
    InfluenceFunction(EKFAC()),
    InfluenceFunction(ConjugateGradient()),
    SOURCE(segments=1),
    RepresenterPoints(),
    TracInCP(units="paper"),
]


def test_methods_that_take_one_loss_per_example_are_refused_with_the_way_out(tmp_path):
    fitted = Fitted(tmp_path, "rises")
    asked = fitted.attributor()
    for method in CANNOT:
        with pytest.raises(
            ValueError, match=rf"on `batch_idx` for `{method.name}`.*`batch_idx=2` than at `batch_idx=0`"
        ):
            asked.score(method, ASKED)
        with pytest.raises(ValueError, match=r"Use `TracInCP\(\)`, `TracIn\(\)` or `HyDRA\(\)`.*or pass `loss=`"):
            asked.group(method, [0, 1], ASKED)
    with pytest.raises(ValueError, match=r"on `batch_idx` for `GradientDot`"):
        asked.self_influence(GradientDot())
    loss = lambda module, batch: module.net(*batch[:2], 0)  # noqa: E731
    by_loss = fitted.attributor(loss=loss).score(GradientDot(), ASKED)
    assert not any("batch_idx" in note for note in by_loss.notes)
    with pytest.warns(UserWarning, match=r"depends on `batch_idx`.*those at `batch_idx=0`"):
        losses = asked.losses()
    params = dict(fitted.module.net.named_parameters())
    expected = oracles_dynamic.call(fitted.run.module, params, *TRAIN.tensors[:2], 0).detach()
    torch.testing.assert_close(losses.values, expected)


def test_a_measurement_gives_queries_a_loss_without_an_index(tmp_path):
    fitted = Fitted(tmp_path, "rises")
    measured = lambda module, batch: module.net(*batch[:2], 2)  # noqa: E731
    scores = fitted.attributor().score(TracInCP(), ASKED, measurement=measured)
    assert_scores(scores.values, tracin_cp(fitted, queries=lambda k: 2), 1e-10)
    (note,) = [note for note in scores.notes if "depends on `batch_idx`" in note]
    assert "query" not in note


def test_features_that_depend_on_the_index_are_refused_others_are_not(tmp_path):
    fitted = Fitted(tmp_path, "rises")
    attributor = fitted.attributor()
    assert attributor.score(KNNShapley(), ASKED).values.isfinite().all()
    step = Module.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "training_step", lambda s, b, i: step(s, [b[0] * (1 + i), *b[1:]], i))
        with pytest.raises(ValueError, match=r"features that do not depend on `batch_idx`, got .*Pass `features=`"):
            fitted.attributor().score(KNNShapley(), ASKED)


def earlier(folder):
    """The run as an earlier version wrote it, without the column."""
    path = next(folder.glob("run-*")) / "manifest.json"
    manifest = json.loads(path.read_bytes())["manifest"]
    for entry in manifest["steps"]:
        file = path.parent / entry["file"]
        table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all().drop_columns(["batch_idx"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        file.write_bytes(content)
        entry |= {"size": len(content), "crc32": zlib.crc32(content)}
    body = json.dumps(manifest, sort_keys=True).encode()
    path.write_text(json.dumps({"crc32": zlib.crc32(body), "manifest": manifest}))
    return Trajectory.load(folder)


def test_runs_that_do_not_know_the_indices_are_refused_where_the_loss_depends_on_them(tmp_path):
    fitted = Fitted(tmp_path, "rises")
    fitted.trajectory = earlier(tmp_path)
    assert fitted.trajectory.batch_indices is None
    asked = fitted.attributor()
    for method in (TracInCP(), TracIn(), HyDRA()):
        with pytest.raises(MissingEvidence, match=r"record of the index \(`batch_idx`\).*Fit again.*or pass `loss=`"):
            asked.score(method, ASKED)
    path = tmp_path / "x.ckpt"
    fitted.trainer.save_checkpoint(path)
    fitted.trajectory = Trajectory.from_checkpoints([path], learning_rates=0.1)
    with pytest.raises(MissingEvidence, match=r"got none, and other gradients"):
        fitted.attributor().score(TracInCP(), ASKED)


def test_runs_of_earlier_versions_give_the_same_scores_where_nothing_depends_on_the_index(tmp_path):
    data, influence, module = Indexed(), Influence(dirpath=tmp_path), Net()
    fit(module, loader(data), influence)
    now = influence.trajectory
    before = earlier(tmp_path)
    for method in (TracInCP(), TracIn(), HyDRA(checks=0)):
        found = [Attributor(module, data, t).score(method, data).values for t in (now, before)]
        assert torch.equal(*found)


def test_an_unknown_batch_order_is_refused(tmp_path):
    class Rising(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + batch_idx)

    module = Rising()
    with pytest.warns(UserWarning, match="sample_id"):
        fit(module, DataLoader(Stream(), 4), Influence(dirpath=tmp_path))
    with pytest.raises(MissingEvidence, match=r"record of the index \(`batch_idx`\) and the examples"):
        Attributor(module, Indexed(), Trajectory.load(tmp_path)).score(TracInCP(), Indexed())


# ---- what is recorded ------------------------------------------------------------------------------------------------


class Noting(Net):
    """Writes down the index of every batch that has a loss."""

    def __init__(self, skip=(), **settings):
        super().__init__(**settings)
        self.skip, self.indices = skip, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.skip:
            return None
        self.indices.append((int(batch_idx), self.seen[-1]))
        return loss


def pairs(trajectory):
    columns = trajectory.steps.select(["batch_idx", "ids"]).to_pylist()
    return [pair for row in columns for pair in zip(row["batch_idx"], row["ids"], strict=True)]


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({}, {"accumulate_grad_batches": 4}),
        ({"skip": (1, 2)}, {"accumulate_grad_batches": 2}),
        ({"stop_at": 3}, {"max_epochs": 3}),
        ({"optimizer": "lbfgs"}, {}),
    ],
)
def test_the_index_of_every_micro_batch_is_recorded(settings, options, tmp_path):
    module = Noting(**settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step. returned .None.")
        fit(module, loader(), Influence(dirpath=tmp_path), **options)
    expected = module.indices
    if "optimizer" in settings:  # one step calls training_step many times
        expected = [pair for k, pair in enumerate(expected) if k == 0 or pair != expected[k - 1]]
    assert pairs(Trajectory.load(tmp_path)) == expected


def test_a_fit_resumed_within_an_epoch_goes_on_counting(tmp_path):
    first = Noting()
    fit(first, loader(), Influence(dirpath=tmp_path), SaveAt(3, tmp_path / "x.ckpt"))
    second = Noting()
    fit(second, loader(), Influence(dirpath=tmp_path), ckpt_path=tmp_path / "x.ckpt")
    assert second.indices[0][0] == 3
    assert pairs(Trajectory.load(tmp_path)) == first.indices[:3] + second.indices


# ---- the search for a dependence -------------------------------------------------------------------------------------


def found(function, count=1000):
    """What is found for a number computed from the index, and the indices that were tried."""
    tried = []

    def run(index):
        if type(index) is WatchedIndex:
            tried.append(object.__getattribute__(index, "_at"))
        return {"": torch.as_tensor(float(function(index)))}

    return differing_indices(run, range(count)), len(tried)


@pytest.mark.parametrize(
    "function",
    [
        lambda i: i % 2,
        lambda i: 1.0 if i % 50 == 49 else 0.0,
        lambda i: 1.0 if i == 999 else 0.0,
        lambda i: 1.0 if i == 517 else 0.0,
        lambda i: 1.0 if 300 < i <= 302 else 0.0,
        lambda i: 1.0 if (i // 7, i % 7) == (20, 3) else 0.0,
        lambda i: 1.0 if i in (5, 612) else 0.0,
        lambda i: 1.0 if -i + 3 > 2 and not i else 0.0,
        lambda i: 1.0 if abs(i - 500) < 1 else 0.0,
        lambda i: 1.0 if 2**i > 2**900 and i & 1 else 0.0,
        lambda i: 1.0 if round(i / 100) == 7 else 0.0,
        lambda i: 1.0 if math.floor(i / 90) == 4 else 0.0,
        lambda i: float([0.0, 1.0][int(i / 500)]),
        lambda i: max(i, 700),
        lambda i: float(f"{i}"),
        lambda i: len(range(i)),
        lambda i: sum(torch.eye(3)[i % 3].tolist()[:1]),
        lambda i: i.bit_length(),
        lambda i: {True: 1.0, False: 2.0}[i > 640],
    ],
)
def test_a_dependence_is_found(function):
    pair, _ = found(function)
    assert pair is not None
    assert function(pair[0]) != function(pair[1])


@pytest.mark.parametrize(
    ("function", "tries"),
    [
        (lambda i: 1.0, 1),
        (lambda i: 1.0 + 0 * (i % 50 == 0), 2),
        (lambda i: 1.0 if i % 2 == 0 or i % 2 == 1 else 2.0, 2),
        (lambda i: len(f"{i}") * 0.0, 6),
        (lambda i: isinstance(i, int), 1),
        (lambda i: 1.0 if i < 0 else 2.0, 1),
    ],
)
def test_a_use_without_consequence_is_none(function, tries):
    assert found(function) == (None, tries)


def test_what_takes_no_watched_integer_is_tried_with_plain_ones():
    def run(index):
        if type(index) is not int:
            raise TypeError
        return {"": torch.tensor(float(index > 400))}

    assert differing_indices(run, range(1000)) == (0, 999)
    assert differing_indices(lambda index: 1 / 0, range(3)) is None


def test_an_index_without_a_loss_is_not_in_question():
    values = {1: 5.0, 2: 5.0, 3: 5.0}

    def run(index):
        return None if index % 4 == 0 else {"": torch.tensor(values.get(int(index), 6.0))}

    assert differing_indices(run, range(4)) is None
    assert differing_indices(run, range(7)) == (6, 1)
    assert differing_indices(lambda index: None, range(4)) is None


def test_results_that_differ_at_one_index_tell_nothing():
    draw = torch.Generator().manual_seed(0)
    assert differing_indices(lambda index: {"": torch.randn(3, generator=draw) * (1 + index)}, range(9)) is None


def test_a_watched_index_is_an_integer_in_all_it_computes():
    keys = []
    i = WatchedIndex(7, keys)
    assert isinstance(i, int)
    assert [i + 1, 1 + i, i - 1, 1 - i, i * 2, 2 * i, i / 2, 14 / i] == [8, 8, 6, -6, 14, 14, 3.5, 2]
    assert [i // 2, 15 // i, i % 4, 9 % i, i**2, 2**i, -i, +i, ~i, i << 1, i >> 1] == [
        3,
        2,
        3,
        2,
        49,
        128,
        -7,
        7,
        -8,
        14,
        3,
    ]
    assert [i & 3, i | 8, i ^ 1, 8 | i, divmod(i, 2), divmod(15, i)] == [3, 15, 6, 15, (3, 1), (2, 1)]
    assert [int(i), float(i), complex(i), str(i), repr(i), f"{i:03d}", round(i)] == [7, 7.0, 7, "7", "7", "007", 7]
    assert [hash(i), list("abcdefgh")[i], i.real, bool(i), i == 7, i != 7, i < 8, i > 8] == [
        7,
        "h",
        7,
        True,
        True,
        False,
        True,
        False,
    ]
    assert [i + i, i == i + 0, i == None, i == "7"] == [14, True, False, False]  # noqa: E711
    assert torch.equal(torch.ones(2) * i, torch.full((2,), 7.0))
    assert torch.equal(i / torch.ones(2), torch.full((2,), 7.0))
    with pytest.raises(ZeroDivisionError):
        5 // (i - 7)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_step_that_only_reports_the_index_takes_the_plain_path(name):
    module = INDEPENDENT[name]().double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    dataset = TensorDataset(x, y)
    with Attributor(module, dataset).session(dataset) as setting:
        assert setting.batch_index.differing(None) is None
        assert setting.batch_index.reads == (name != "deletes the index")


def test_code_that_reads_the_index_is_told_from_code_that_does_not():
    class Steps:
        def no(self, batch, batch_idx):
            return batch

        def deleted(self, batch, batch_idx):
            batch_idx = 3
            del batch_idx
            return batch

        def yes(self, batch, i):
            return self.no(batch, i)

        def closed(self, batch, i):
            return [batch * i for _ in range(3)]

        def inner(self, batch, i):
            return lambda: i

        def hidden(self, batch, i):
            return locals()["i"]

        def stars(self, batch, *rest):
            return batch

        wrapped = functools.wraps(no)(lambda self, *args: args[1])

    steps = Steps()
    reads = {name for name in vars(Steps) if not name.startswith("_") and reads_index(getattr(steps, name))}
    assert reads == {"yes", "closed", "inner", "hidden", "stars", "wrapped"}
    assert reads_index(functools.partial(steps.no))
    assert not reads_index(lambda batch, i: batch)


def test_ordinary_modules_take_no_pass_of_their_own(monkeypatch):
    from lightning_influence.module.task import Task

    calls, call = [], Task.__call__
    monkeypatch.setattr(Task, "__call__", lambda task, batch: calls.append(type(task.batch_idx)) or call(task, batch))
    with contextlib.suppress(MissingEvidence):
        Attributor(Net(), Indexed()).score(GradientDot(), Indexed())
    assert calls.count(WatchedIndex) == 1


def test_the_cases_are_those_of_the_table():
    assert len(DEPENDENT) + len(INDEPENDENT) >= 25
