"""What happens when a fit with `Influence(methods=...)` ends: scores, files, logs, and reasons where there are none."""

import contextlib
import re
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    Evidence,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    Method,
    Scores,
    SelfScores,
    TracInCP,
    Trajectory,
)
from lightning_influence.callback.end_of_fit import EndOfFit, meant, score_at_end
from lightning_influence.callback.offline import cheaper, slow_gradients
from lightning_influence.callback.queries import resolve_queries
from lightning_influence.callback.results import NoScores, Results
from lightning_influence.callback.summary import Summary
from lightning_influence.methods.plain_loss import PlainLoss


def make_net(package):
    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Net()


def data(n):
    draw = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw))


TRAIN, VAL, OTHER = data(24), data(6), data(5)


def fit(influence, tmp_path, package=pl, loggers=False, **options):
    net = make_net(package)
    settings = {**QUIET, "max_epochs": 2, "default_root_dir": tmp_path, "callbacks": [influence], "logger": loggers}
    trainer = package.Trainer(**(settings | options))
    loaders = [DataLoader(VAL, 4), DataLoader(OTHER, 4)]
    trainer.fit(net, DataLoader(TRAIN, 6, shuffle=True), loaders)
    return trainer, net


@pytest.mark.parametrize("package", [pl, lightning.pytorch])
def test_scores_are_there_after_the_fit_and_on_disk(tmp_path, package):
    influence = Influence([TracInCP(), GradientDot()], queries="val", self_influence=True, max_cost=1e6)
    fit(influence, tmp_path, package)
    assert set(influence.scores) == set(influence.self_scores) == {"TracInCP", "GradientDot"}
    assert influence.scores["TracInCP"].values.shape == (6, 24)
    saved = influence.run_dir / "scores"
    assert torch.equal(Scores.load(saved / "TracInCP.arrow").values, influence.scores["TracInCP"].values)
    assert len(SelfScores.load(saved / "TracInCP.self.arrow")) == 24


def test_scores_at_the_end_equal_those_asked_afterwards(tmp_path):
    influence = Influence({"cp": TracInCP()}, queries=VAL, max_cost=1e6)
    fit(influence, tmp_path)
    torch.testing.assert_close(influence.scores["cp"].values, influence.attributor.score(TracInCP(), VAL).values)


@pytest.mark.parametrize(("queries", "count"), [("train", 24), ("val", 6), ("val:1", 5), (DataLoader(OTHER, 2), 5)])
def test_queries_are_found_by_word(tmp_path, queries, count):
    influence = Influence([GradientDot()], queries=queries, top_k=3, max_cost=1e6)
    fit(influence, tmp_path)
    assert len(influence.scores["GradientDot"]) == count
    assert influence.scores["GradientDot"].top_k == 3


def test_a_numbered_training_loader_is_no_test_loader():
    loaders = [DataLoader(VAL, 4), DataLoader(OTHER, 4)]
    trainer = SimpleNamespace(train_dataloader=loaders, test_dataloaders=DataLoader(TRAIN, 6))
    assert [resolve_queries(f"train:{k}", trainer) for k in (0, 1)] == loaders


def test_test_data_come_from_the_module(tmp_path):
    influence = Influence([GradientDot()], queries="test", max_cost=1e6)
    net = make_net(pl)
    net.test_dataloader = lambda: DataLoader(OTHER, 2)
    trainer = pl.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[influence])
    trainer.fit(net, DataLoader(TRAIN, 6), DataLoader(VAL, 4))
    assert len(influence.scores["GradientDot"]) == 5


def test_scores_reach_tensorboard(tmp_path):
    influence = Influence([TracInCP()], queries="val", self_influence=True, max_cost=1e6)
    trainer, _ = fit(influence, tmp_path, loggers=pl.loggers.TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert any("influence/TracInCP" in tag for tag in tags["scalars"])
    assert "influence/TracInCP/explanation_figure" in tags["images"]
    assert "influence/TracInCP/self_influence_highest_figure" in tags["images"]
    assert any("influence/TracInCP" in tag for tag in tags["tensors"])


def test_nothing_is_logged_when_not_wanted(tmp_path):
    influence = Influence([TracInCP()], queries="val", log_scores=False, max_cost=1e6)
    _trainer, _ = fit(influence, tmp_path, loggers=pl.loggers.CSVLogger(tmp_path))
    assert not list((tmp_path / "lightning_logs").rglob("influence_*"))
    assert "TracInCP" in influence.scores


def test_a_missing_loader_is_a_reason_not_a_failure(tmp_path):
    influence = Influence([GradientDot()], queries="val:4", max_cost=1e6)
    with pytest.warns(UserWarning, match=r"GradientDot will not score queries when this fit ends.* got 2 of that kind"):
        fit(influence, tmp_path)
    with pytest.raises(KeyError, match=r"'GradientDot' did not run: Expected the Trainer to have a loader"):
        influence.scores["GradientDot"]


def test_an_unknown_key_lists_what_exists(tmp_path):
    influence = Influence([GradientDot()], queries="val", max_cost=1e6)
    assert dict(influence.scores) == {}
    fit(influence, tmp_path)
    with pytest.raises(KeyError, match=r"Expected the name of existing scores \('GradientDot'\), got 'EKFAC'"):
        influence.scores["EKFAC"]


@pytest.fixture
def printed(monkeypatch):
    """What is said when a fit ends; which logger it goes to depends on the package that was imported first."""
    lines = []
    monkeypatch.setattr("lightning_influence.callback.end_of_fit.rank_zero_info", lines.append)
    return lines


def test_without_queries_the_reason_is_given(tmp_path, printed):
    influence = Influence([GradientDot()])
    fit(influence, tmp_path)
    assert any("GradientDot did not run, since no `queries` were given" in line for line in printed)
    with pytest.raises(KeyError, match=r"no `queries` were given"):
        influence.scores["GradientDot"]


def test_a_plan_beyond_the_budget_is_not_started(tmp_path):
    influence = Influence([TracInCP()], queries="val", max_cost=1e-9)
    with pytest.warns(
        UserWarning, match=r"`TracInCP`'s scores were not started\. It would take about .*`max_cost=1e-09`"
    ):
        fit(influence, tmp_path)
    with pytest.raises(KeyError, match=r"'TracInCP' did not run: It would take about"):
        influence.scores["TracInCP"]


def test_by_default_less_than_a_minute_is_never_refused():
    def limit(**options):
        return Influence(**options)._plan.limit(0.5)

    assert limit() == 60
    assert limit(max_cost=10) == 5
    assert Influence()._plan.limit(30) == 300
    assert Influence().max_cost == 10


def test_what_a_refusal_advises_would_help_that_method():
    assert "fewer checkpoints" in cheaper(TracInCP(), False)
    assert "fewer queries" in cheaper(TracInCP(), False)
    assert "queries" not in cheaper(TracInCP(), True)
    assert "checkpoints" not in cheaper(GradientDot(), False)
    assert "`EKFAC()`" in cheaper(InfluenceFunction(ExactGGN()), False)
    assert "EKFAC" not in cheaper(InfluenceFunction(EKFAC()), False)
    assert "`segments=2`" in cheaper(SOURCE(3), False)
    assert "`hessian=False`" in cheaper(HyDRA(), False)
    assert cheaper(PlainLoss("all"), True) == "Raise `max_cost`, or score after the fit"


def test_a_refusal_names_the_parameters_that_make_it_dear():
    assert slow_gradients(TracInCP(), ["gru.w", "gru.b", "gru.c"]) == (
        " Most of it is `gru.w` and 2 more, whose gradients are computed one example at a time; pad sequences in place"
        " of packing them, or leave them out by `parameters=`."
    )
    assert slow_gradients(HyDRA(), ["gru.w"]).endswith(
        "is `gru.w`, whose gradients are computed one example at a time; pad sequences in place of packing them."
    )
    assert not slow_gradients(TracInCP(), [])
    assert not slow_gradients(PlainLoss("all"), ["gru.w"])


def test_a_warning_on_images_is_given_once_whatever_their_ranges():
    end = EndOfFit(*[None] * 4, Summary(Path("run-0"), 0.0), None, None)

    def shows(low):
        with end._told_once():
            warnings.warn(f"Values from {low} to 3.", stacklevel=1)
            warnings.warn(f"Values from {low} to 4.", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shows(-2)
        shows(-1.5)
    assert [str(one.message) for one in caught] == ["Values from -2 to 3."]


def test_messages_say_whether_scores_or_self_influence_are_meant():
    assert meant("HyDRA", True) == "HyDRA's self-influence"
    assert meant("`HyDRA`", False) == "`HyDRA`'s scores"
    assert meant("`labels`", True, "was", "were") == "`labels` was"
    assert meant("scores", False, "was", "were") == "scores's scores were"
    assert meant("my_scores", True, "was", "were") == "my_scores's self-influence was"


def test_every_second_since_training_ended_is_in_the_block_where_it_matters(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lightning_influence.callback.summary.time.perf_counter", lambda: now[0])
    scores = Scores(torch.ones(1, 2), None, torch.arange(2), torch.arange(1), method="m")
    summary = Summary(tmp_path, 100.0, 5.0)
    summary.add("m", scores, 1.0, 3.0)
    for part, seconds in {"checks": 3, "scores": 3, "saving": 0.2, "logging": 4}.items():
        with summary.spending(part):
            now[0] += seconds
    assert "computed in 3.0 s (0.6 times the fit's 5.0 s)" in str(summary)
    assert "\n  10 s since training ended: checks 3 s, scores 3 s, logging 4 s\n" in str(summary)
    now[0] += 7  # unknown to us
    assert "17 s since training ended: checks 3 s, scores 3 s, logging 4 s, other 7 s" in str(summary)
    summary.began = 114.5
    assert "since training" not in str(summary)


def test_self_influence_is_offered_again_where_that_was_refused(tmp_path):
    influence = Influence([TracInCP()], self_influence=True, max_cost=1e-9)
    with pytest.warns(
        UserWarning, match=r"`TracInCP`'s self-influence was not started(.|\n)*attributor\.self_influence\(TracInCP\("
    ):
        fit(influence, tmp_path)


def test_a_missing_loader_is_told_before_the_first_step(tmp_path):
    told, net = [], make_net(pl)

    class Listens(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            told.append([str(one.message) for one in caught if "will not score" in str(one.message)])

    influence = Influence([GradientDot()], queries="val", max_cost=1e6)
    trainer = pl.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[influence, Listens()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(net, DataLoader(TRAIN, 6))
    assert "queries='val'`, got 0 of that kind" in told[0][0]
    assert sum("got 0 of that kind" in str(one.message) for one in caught) == 1  # not again at the end
    assert "got 0 of that kind" in influence.scores.reasons["GradientDot"]


def test_a_loader_that_was_passed_is_found_where_no_validation_runs(tmp_path):
    influence = Influence([GradientDot()], queries="val", max_cost=1e6)
    fit(influence, tmp_path, limit_val_batches=0)
    assert len(influence.scores["GradientDot"]) == 6


def test_results_are_found_by_key():
    found = Results()
    found["TracInCP"] = 1
    with pytest.raises(AttributeError, match=r"no attribute 'TracInCP'\. Use `\['TracInCP'\]`\."):
        _ = found.TracInCP
    with pytest.raises(TypeError, match=r"`checkpoints` to be a list or None, got 1\. Write `checkpoints=\[1\]`"):
        TracInCP(checkpoints=1)
    with pytest.raises(TypeError, match=r"as 'TracInCP'. Make one: `TracInCP\(\)`"):
        Influence([TracInCP])


def test_results_print_as_a_table(tmp_path):
    influence = Influence([GradientDot(), TracInCP()], queries="val", max_cost=1e6, labels=True)
    assert repr(influence.scores) == "No scores yet."
    fit(influence, tmp_path)
    table = [line.split("  ") for line in repr(influence.scores).splitlines()]
    assert "GradientDot" in table[1][1]
    assert "scores of 6 queries by 24 training examples" in repr(influence.scores)
    told = repr(influence.self_scores)
    assert "mean loss over 2 checkpoints, 24 training examples" in told
    assert "did not run: `self_influence=True` was not given" in told
    with pytest.raises(AttributeError, match=r"Use that of one method: `influence\.scores\[name\]\.proponents`"):
        influence.scores.proponents(5)
    with pytest.raises(AttributeError, match=r"Use `influence\.attributor\.score\(method, \.\.\.\)`"):
        influence.score(TracInCP(), VAL)


def test_only_news_among_the_notes_are_told_and_a_single_one_in_full(tmp_path, printed):
    influence = Influence([GradientDot()], queries="val", max_cost=1e6)
    fit(influence, tmp_path)
    assert influence.scores["GradientDot"].notes
    assert "note on" not in printed[-1]
    assert "with 1 note" not in printed[-1]
    summary = Summary(tmp_path, 0.0, 1.0)
    scores = influence.scores["GradientDot"]
    scores.notes = (*scores.notes, "Something to know.")
    summary.add("GradientDot", scores, 1.0, 1.0)
    assert "note on influence.scores['GradientDot']: Something to know." in str(summary)
    scores.notes = (*scores.notes, "And more.")
    summary.add("again", scores, 1.0, 1.0)
    assert "influence.scores['again'], with 2 notes: print(influence.scores['again'].notes)" in str(summary)


def test_one_block_says_what_was_scored_and_what_to_look_at_first(tmp_path, printed, monkeypatch):
    monkeypatch.setattr("lightning_influence.callback.summary._WORTH_TELLING", 1e9)
    influence = Influence({"a": GradientDot(), "bad": Fails()}, queries="val", self_influence=True)
    with pytest.warns(UserWarning, match="`bad` failed"):
        fit(influence, tmp_path, loggers=True)
    (block,) = printed
    lines = [line.strip() for line in block.splitlines()]
    assert lines[0].startswith("Influence of 24 training examples, computed in ")
    assert re.fullmatch(r"a  6 queries +[\d.]+ s \(estimated: [\d.]+ s\)  influence\.scores\['a'\].*", lines[1])
    assert re.fullmatch(r"a  each example on itself .* influence\.self_scores\['a'\].*", lines[2])
    assert lines[3:] == [
        "without bad's scores, bad's self-influence: a warning says why",
        f"saved in {str(influence.run_dir / 'scores')!r}",
        "logged by TensorBoardLogger",
        "look first at: print(influence.self_scores['a'].top(20))",
    ]


def test_labels_are_ranked_by_the_mean_of_their_losses(tmp_path, printed):
    influence = Influence(labels=True)
    fit(influence, tmp_path, loggers=True)
    found = influence.self_scores["labels"]
    assert torch.equal(found.values, influence.attributor.losses(checkpoints="all").values)
    assert torch.equal(SelfScores.load(influence.run_dir / "scores" / "labels.self.arrow").values, found.values)
    (block,) = printed
    assert "labels  mean loss over 2 checkpoints of each example" in block
    assert "print(influence.self_scores['labels'].top(20))" in block
    with pytest.raises(ValueError, match="Expected no method named 'labels' with `labels=True`"):
        Influence({"labels": GradientDot()}, labels=True)
    dear = Influence(labels=True, max_cost=1e-9)
    with pytest.warns(UserWarning, match=r"`labels` was not started(.|\n)*losses\(checkpoints='all'\)"):
        fit(dear, tmp_path)


@pytest.mark.parametrize("options", [{"verbose": False}, {"max_cost": 1e-9}])
def test_nothing_is_printed_when_nothing_was_asked_or_scored(tmp_path, printed, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Influence([GradientDot()], queries="val", **options), tmp_path)
    assert printed == []


class Fails(Method):
    needs = Evidence.FINAL_WEIGHTS
    error: BaseException = RuntimeError("no such luck")

    def score(self, setting, queries):
        raise self.error

    def hyperparameters(self):
        return {}


@pytest.mark.parametrize("package", [pl, lightning.pytorch])
def test_influence_functions_run_when_the_fit_ends_and_again_offline(tmp_path, package, monkeypatch):
    methods = {"exact": InfluenceFunction(ExactGGN()), "ekfac": InfluenceFunction(EKFAC())}
    influence = Influence(methods, queries="val", self_influence=True, max_cost=1e6, dirpath=tmp_path / "runs")
    _, net = fit(influence, tmp_path, package)
    _, bare = fit(Influence(), tmp_path, package)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))
    assert set(influence.scores) == set(influence.self_scores) == set(methods)
    for curvature in (ExactGGN, EKFAC):
        monkeypatch.setattr(curvature, "prepare", None)  # what was prepared at the end of the fit lies beside it
    offline = Attributor(make_net(package), TRAIN, Trajectory.load(tmp_path / "runs"))
    for name, method in methods.items():
        torch.testing.assert_close(offline.score(method, VAL).values, influence.scores[name].values)
        torch.testing.assert_close(offline.self_influence(method).values, influence.self_scores[name].values)


def test_an_error_while_scoring_never_fails_the_fit(tmp_path):
    influence = Influence([Fails(), GradientDot()], queries="val", max_cost=1e6)
    with pytest.warns(UserWarning, match=r"`Fails` failed with RuntimeError .*: no such luck\n(.|\n)*Trajectory\.load"):
        trainer, _ = fit(influence, tmp_path)
    assert trainer.state.finished
    assert "GradientDot" in influence.scores


class Interrupts(Fails):
    def score(self, setting, queries):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal did not arrive")


@pytest.fixture
def listening():
    """A shell's background jobs ignore Ctrl-C, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_stops_the_scoring_only(tmp_path):
    influence = Influence([Interrupts(), GradientDot()], queries="val", max_cost=1e6)
    with pytest.warns(UserWarning, match=r"Scoring was interrupted; the fit itself is complete"):
        trainer, net = fit(influence, tmp_path)
    assert trainer.state.finished
    assert "log" not in net.__dict__
    assert dict(influence.scores) == {}
    for name in ("Interrupts", "GradientDot"):
        with pytest.raises(KeyError, match=r"interrupted(.|\n)* the fit|The fit is complete(.|\n)*Trajectory\.load"):
            influence.scores[name]


class InterruptsItself(GradientDot):
    def self_influence(self, setting):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal did not arrive")


@pytest.mark.usefixtures("listening")
def test_ctrl_c_in_self_influence_is_continued_by_self_influence(tmp_path):
    influence = Influence([InterruptsItself()], queries="val", self_influence=True, max_cost=1e6)
    with pytest.warns(UserWarning, match=r"Scoring was interrupted(.|\n)*attributor\.self_influence\("):
        fit(influence, tmp_path)
    assert list(influence.scores) == ["InterruptsItself"]


def test_self_influence_that_is_the_same_for_all_is_not_continued(tmp_path):
    influence = Influence([GradientDot(normalize="cosine")], self_influence=True, max_cost=1e6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(influence, tmp_path)
    (told,) = [str(w.message) for w in caught if "GradientDot" in str(w.message)]
    assert told.startswith("`GradientDot` has no self-influence. Expected `normalize=None`")
    assert "To continue" not in told
    with pytest.raises(NoScores, match=r"Pass `Influence\(labels=True\)`"):
        influence.self_scores["labels"]


class InterruptsTheFit(pl.Callback):
    def on_train_batch_end(self, *_):
        raise KeyboardInterrupt


def test_ctrl_c_in_the_fit_says_where_its_record_is(tmp_path):
    influence = Influence([GradientDot()], queries="val")
    with (
        mock.patch("lightning_influence.callback.influence.rank_zero_info") as info,
        contextlib.suppress(SystemExit, KeyboardInterrupt),
    ):
        fit(influence, tmp_path, callbacks=[influence, InterruptsTheFit()])
    assert f"Recorded in {str(influence.run_dir)!r}" in info.call_args.args[0]


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("itself", [False, True])
def test_ctrl_c_before_the_first_method_is_the_reason_too(tmp_path, monkeypatch, itself):
    influence = Influence([GradientDot()], queries="val", self_influence=itself)
    monkeypatch.setattr(
        "lightning_influence.callback.plan.ScoringPlan.attributor", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    with pytest.warns(UserWarning, match=r"Scoring was interrupted; the fit itself is complete"):
        trainer, _ = fit(influence, tmp_path)
    assert trainer.state.finished
    for results in [influence.scores] + [influence.self_scores] * itself:
        with pytest.raises(KeyError, match=r"Scoring was interrupted(.|\n)*Trajectory\.load"):
            results["GradientDot"]


@pytest.mark.parametrize("sample_id", [None, "idx"])
def test_a_stream_is_not_continued_by_lines_that_would_be_refused(tmp_path, sample_id):
    plan, trainer = Influence([GradientDot()], sample_id=sample_id)._plan, SimpleNamespace(datamodule=None)
    trainer.train_dataloader, trainer.strategy = DataLoader(Stream()), pl.Trainer(**QUIET).strategy
    refused = mock.Mock(side_effect=TypeError("no examples by index"))
    with pytest.warns(UserWarning, match="Scores were not computed") as caught:
        score_at_end(plan, trainer, tmp_path, refused, Results(), Results(), 0.0)
    text = str(caught[0].message)
    assert ("To continue" in text) == (sample_id is not None) == (", lookup=lookup)" in text)
    assert ("`Influence(sample_id=, lookup=)`" in text) == (sample_id is None)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(VAL)


@pytest.mark.parametrize(
    ("queries", "error", "text"),
    [
        (torch.utils.data.Subset(VAL, []), ValueError, r"Expected `queries` to hold at least one example"),
        (Stream(), TypeError, r"Expected `queries` to be a map-style Dataset"),
    ],
)
def test_queries_that_cannot_be_scored_are_refused_before_training(tmp_path, queries, error, text):
    influence = Influence([GradientDot()], queries=queries)
    with pytest.raises(error, match=text):
        fit(influence, tmp_path)


class Refits(Fails):
    needs = Evidence.REFIT


def test_methods_that_train_again_are_refused_at_once():
    with pytest.raises(ValueError, match=r"Expected `methods` that can run when a fit ends, got 'Refits'"):
        Influence([Refits()])


def test_scoring_leaves_training_bit_identical(tmp_path):
    _, scored = fit(Influence([TracInCP()], queries="val", self_influence=True, max_cost=1e6), tmp_path)
    net = make_net(pl)
    trainer = pl.Trainer(**QUIET, max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(net, DataLoader(TRAIN, 6, shuffle=True), [DataLoader(VAL, 4), DataLoader(OTHER, 4)])
    torch.testing.assert_close(scored.state_dict(), net.state_dict(), rtol=0, atol=0)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, 6, shuffle=True)

    def val_dataloader(self):
        return DataLoader(VAL, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], batch[1]]


def collated(items):
    x, y = torch.utils.data.default_collate(items)
    return [2 * x, y]


def weighted(module, batch):
    return 2 * F.cross_entropy(module.layer(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("method", "options", "given", "contains"),
    [
        (InfluenceFunction(EKFAC(damping=0.1)), {}, {}, "import Attributor, Trajectory, EKFAC, InfluenceFunction"),
        (GradientDot(), {"top_k": 2}, {}, "train=train_dataloader, trajectory=trajectory)"),
        (TracInCP(), {"queries": "train"}, {}, "queries='train')"),
        (TracInCP(), {"queries": VAL}, {"queries": VAL}, "queries=queries)"),
        (TracInCP(checkpoints=(-1,)), {}, {"datamodule": Data()}, "datamodule=datamodule)"),
        (TracInCP(), {"loss": weighted, "parameters": "*weight"}, {"loss": weighted}, "parameters=['*weight'])"),
        (TracInCP(), {}, {"precision": "64-true"}, "trajectory=trajectory)"),
        (TracInCP(), {"precision": "bf16-mixed"}, {"precision": "bf16-mixed"}, "precision='bf16-mixed')"),
    ],
    ids=["method", "loader", "train", "queries", "datamodule", "loss", "precision", "mixed"],
)
def test_the_lines_that_are_printed_give_the_scores(tmp_path, method, options, given, contains):
    asked, precision = {"queries": "val"} | options, given.pop("precision", None)
    influence = Influence([method], **asked, max_cost=1e-9, dirpath=tmp_path)
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[influence], precision=precision)
    train, val = DataLoader(TRAIN, 6, collate_fn=collated), DataLoader(VAL, 4, collate_fn=collated)
    loaders = {} if "datamodule" in given else {"train_dataloaders": train, "val_dataloaders": val}
    with pytest.warns(UserWarning, match="were not started") as caught:
        trainer.fit(make_net(pl), **loaders, datamodule=given.get("datamodule"))
    text = next(str(warning.message) for warning in caught if "were not started" in str(warning.message))
    lines = "\n".join(line.strip() for line in text.splitlines()[1:])
    assert contains in lines
    names = {"model": make_net(pl), **given}
    if loaders:
        names |= {"train_dataloader": train, "val_dataloader": val}
    exec(lines, names)
    queries = val if loaders and asked["queries"] == "val" else asked["queries"]
    expected = influence.attributor.score(method, queries, top_k=asked.get("top_k"))
    for found, wanted in zip(names["scores"].proponents(2), expected.proponents(2), strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("album", [True, {"labels": {0: "zero"}, "render": lambda example: "a text"}, {"render": int}])
def test_an_album_is_kept_with_the_scores_or_a_warning_says_why_not(tmp_path, album):
    influence = Influence([GradientDot()], queries="val", self_influence=True, album=album, max_cost=1e6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(influence, tmp_path)
    saved = influence.run_dir / "scores"
    both = [Scores.load(saved / "GradientDot.arrow"), SelfScores.load(saved / "GradientDot.self.arrow")]
    if isinstance(album, dict) and "labels" not in album:
        assert [one.album for one in both] == [None, None]
        assert sum("what the examples look like" in str(one.message) for one in caught) == 2
        return
    assert [(len(one.album.train), len(one.album.queries)) for one in both] == [(24, 6), (24, 0)]
    shown = both[0].album.queries[0]
    assert shown["kind"] == ("row" if album is True else "text")
    losses = influence.attributor.losses(VAL).values
    assert shown["loss"] == pytest.approx(float(losses[0]), rel=1e-3)


@pytest.mark.parametrize(("album", "text"), [({"lables": []}, "lables"), (1, "album")])
def test_an_unknown_album_is_refused_at_once(album, text):
    with pytest.raises((ValueError, TypeError), match=text):
        Influence(album=album)
