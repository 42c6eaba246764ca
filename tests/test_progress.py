"""What long calls show while they run: every step of the work is counted to its end; Ctrl-C leaves nothing changed."""

import contextlib
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from case import Step, both, mlp
from replay.runs import fitted
from torch.utils.data import DataLoader

from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    GradientDot,
    HyDRA,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    progress,
)
from lightning_influence.gradients import Engine

torch.set_num_threads(1)


@pytest.fixture
def shown(monkeypatch):
    """{label: [total, done]} of all bars."""
    found = {}

    @contextlib.contextmanager
    def bar(trainer, total, label, unit="example"):
        counts = found[label] = [total, 0]

        def done(count):
            assert count >= 0
            counts[1] += count

        yield done

    monkeypatch.setattr("lightning_influence.attribution.driver.progress", bar)
    return found


METHODS = {
    "GradientDot": (GradientDot(), set()),
    "TracInCP": (TracInCP(), set()),
    "TracIn": (TracIn(), set()),
    "EK-FAC": (InfluenceFunction(EKFAC()), {"EKFAC: factors"}),
    "K-FAC": (InfluenceFunction(EKFAC(corrected=False)), {"EKFAC: factors"}),
    "exact": (InfluenceFunction(ExactGGN()), {"ExactGGN: matrix"}),
    "Arnoldi": (InfluenceFunction(Arnoldi(steps=5)), {"Arnoldi: eigenvectors"}),
    "solver": (InfluenceFunction(ConjugateGradient(damping=0.1)), {"ConjugateGradient: solving"}),
    "SOURCE": (SOURCE(2), {"EKFAC: factors"}),
    "HyDRA": (HyDRA(checks=0), set()),
    "HyDRA, fast": (HyDRA(hessian=False, checks=0), set()),
}


@pytest.mark.parametrize("name", METHODS)
def test_self_influence_and_what_it_prepares_are_counted_to_the_end(name, tmp_path, shown):
    method, prepared = METHODS[name]
    fit = fitted(tmp_path, groups=({"momentum": 0.9},))
    fit.attributor(batch_size=4).self_influence(method)
    assert shown.keys() == {f"{method.name}: self-influence", *prepared}
    assert all(done == total > 0 for total, done in shown.values()), shown


def test_followed_hypergradients_are_counted_to_the_end(tmp_path, shown):
    for hessian in (True, False):
        method = HyDRA.during_fit(hessian)
        fit = fitted(tmp_path / str(hessian), methods=[method], max_cost=1e9)
        fit.attributor(batch_size=4).self_influence(method)
        total, done = shown["HyDRA: self-influence"]
        assert done == total > 0


def test_refits_and_losses_are_counted_to_the_end(tmp_path, shown):
    fit = fitted(tmp_path)
    fit.attributor().score(HyDRA(checks=2), fit.queries)
    fit.attributor().losses()
    assert {"HyDRA", "HyDRA: refits", "labels: loss"} == shown.keys()
    assert all(done == total > 0 for total, done in shown.values()), shown


def test_models_that_are_trained_side_by_side_are_counted_while_they_are(tmp_path, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def counting(trainer, total, label, unit="example"):
        yield lambda done: seen.append((label, done, total))

    monkeypatch.setattr("lightning_influence.refit.models.progress", counting)
    fit = fitted(tmp_path)
    fit.attributor(refit=Refit()).score(LeaveOneOut(), fit.queries)
    for label in ("retraining", "queries under retrained models"):
        counts = [done for of, done, _ in seen if of == label]
        assert sum(counts) == {total for of, _, total in seen if of == label}.pop()
        assert len([count for count in counts if count]) > 3


def test_a_log_gets_a_line_soon_and_then_every_half_minute(monkeypatch, capsys):
    now = iter([0.0, 4.0, 6.0, 35.0, 48.0])
    monkeypatch.setattr("lightning_influence.progress.time.monotonic", lambda: next(now))
    with progress.progress(None, 5_000, "EKFAC: factors") as done:
        for _ in range(4):
            done(1_000)
    assert capsys.readouterr().err.splitlines() == [
        "EKFAC: factors: 2,000 of 5,000 examples, about 6 s left",
        "EKFAC: factors: 4,000 of 5,000 examples, about 15 s left",
    ]


def test_what_is_prepared_before_the_first_piece_is_not_taken_for_its_pace(monkeypatch, capsys):
    now = iter([0.0, 120.0, 121.0, 151.0])
    monkeypatch.setattr("lightning_influence.progress.time.monotonic", lambda: next(now))
    with progress.progress(None, 40_000, "SOURCE") as done:
        for count in (256, 256, 9_744):
            done(count)
    assert capsys.readouterr().err.splitlines() == [
        "SOURCE: 256 of 40,000 examples",
        "SOURCE: 10,256 of 40,000 examples, about 92 s left",
    ]


def test_work_without_pieces_is_told_once_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_FIRST", 0.01)
    told = threading.Event()
    monkeypatch.setattr(progress, "print", lambda *words, **_: (print(*words), told.set()), raising=False)
    with progress.telling(None, "X: checking"):
        assert told.wait(10)
    assert re.fullmatch(r"X: checking \(\d+ s so far\)\n", capsys.readouterr().out)
    trainer = SimpleNamespace(progress_bar_callback=None, is_global_zero=True, state=SimpleNamespace(status="running"))
    with progress.telling(trainer, "X"):
        assert not any(thread.name.endswith("(tell)") for thread in threading.enumerate())


@pytest.mark.parametrize("call", [1, 4, 9, 14])
@pytest.mark.parametrize("name", ["EK-FAC", "SOURCE", "HyDRA"])
def test_an_interrupt_leaves_the_module_as_it_was(name, call, tmp_path, monkeypatch):
    method, fit = METHODS[name][0], fitted(tmp_path)
    right = fit.attributor(batch_size=4).self_influence(method).values
    for stored in fit.influence.trajectory.path.glob("curvature/*"):
        stored.unlink()
    before = {n: v.clone() for n, v in fit.module.state_dict().items()}
    calls, real = [], Engine.gradients

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    attributor, modes = fit.attributor(batch_size=4), [m.training for m in fit.module.modules()]
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "gradients", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            attributor.self_influence(method)
    assert [m.training for m in fit.module.modules()] == modes
    assert all(torch.equal(before[n], v) for n, v in fit.module.state_dict().items())
    torch.testing.assert_close(attributor.self_influence(method).values, right)


@pytest.mark.parametrize(("status", "lines"), [("finished", 1), ("running", 0)])
def test_a_trainer_without_a_bar_is_silent_only_while_it_runs(monkeypatch, capsys, status, lines):
    now = iter([0.0, 31.0])
    monkeypatch.setattr("lightning_influence.progress.time.monotonic", lambda: next(now))
    state = SimpleNamespace(status=status)
    trainer = SimpleNamespace(progress_bar_callback=None, is_global_zero=True, state=state)
    with progress.progress(trainer, 10, "TracInCP") as done:
        done(5)
    assert capsys.readouterr().err == "TracInCP: 5 of 10 examples, about 31 s left\n" * lines


def test_methods_of_forward_passes_are_counted_to_the_end(tmp_path, shown):
    fit = fitted(tmp_path)
    attributor = fit.attributor(batch_size=4)
    attributor.score(RepresenterPoints(), fit.queries)
    attributor.score(KNNShapley(), fit.queries)
    assert {label.split(" `")[0] for label in shown} == {
        "RepresenterPoints",
        "KNNShapley",
        "inputs of the head",
        "solving for the head",
    }
    assert all(done == total > 0 for total, done in shown.values()), shown


def test_a_short_call_writes_nothing_into_a_log(capsys):
    data = both(5)
    module = Step(mlp()).double()
    Attributor(module, DataLoader(data["train"](), 4)).self_influence(GradientDot())
    assert capsys.readouterr().err == ""  # it took no five seconds
