"""`Attributor.cost`: it changes nothing, holds `Influence` back, and is right within a factor."""

import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from test_attributor import QUERIES, TRAIN, Net
from torch.utils.data import DataLoader

from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    Downsampling,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LiSSA,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    Trajectory,
    timing,
)

METHODS = [
    *(TracInCP(), HyDRA(checks=2), KNNShapley(), InfluenceFunction(EKFAC()), Downsampling(n_models=4)),
    InfluenceFunction(ConjugateGradient()),
    *(
        pytest.param(method, marks=pytest.mark.slow)
        for method in (
            *(TracIn(), SOURCE(2), SOURCE(2, ExactGGN()), RepresenterPoints(), InfluenceFunction(ExactGGN())),
            *(InfluenceFunction(EKFAC(), normalize="relatif"), InfluenceFunction(LiSSA(0.1))),
            InfluenceFunction(Arnoldi(steps=10)),
        )
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    net, influence = Net(), Influence(dirpath=tmp_path_factory.mktemp("run"))
    pl.Trainer(**QUIET, max_epochs=3, callbacks=[influence]).fit(net, DataLoader(TRAIN, 5, shuffle=True))
    return net, Trajectory.load(influence.run_dir)


def attributor_of(run, folder):
    return Attributor(run[0], TRAIN, run[1], refit=Refit(dirpath=folder))


def files(*folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "bank.json"
    }


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_asking_for_the_cost_changes_nothing(run, method, tmp_path):
    net, trajectory = run
    expected = attributor_of(run, tmp_path / "one").score(method, QUERIES)
    for path in (trajectory.path / "curvature").glob("*"):
        path.unlink()
    attributor = attributor_of(run, tmp_path / "two")
    before, random, stored = (
        {name: value.clone() for name, value in net.state_dict().items()},
        torch.get_rng_state(),
        files(trajectory.path, tmp_path / "two"),
    )
    modes = [part.training for part in net.modules()]
    assert attributor.cost(method, QUERIES) > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert files(trajectory.path, tmp_path / "two") == stored
    assert [part.training for part in net.modules()] == modes
    found = attributor.score(method, QUERIES)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert found.notes == expected.notes
    assert found.diagnostics == expected.diagnostics


def test_the_pieces_add_up(run, tmp_path):
    cost = attributor_of(run, tmp_path)._cost(TracInCP(), QUERIES)
    assert cost.seconds == pytest.approx(sum(piece.seconds for piece in cost.work))
    assert {"opening", "checkpoints", "reading", "gradients", "products"} <= {piece.what for piece in cost.work}
    by_name = {piece.what: piece.times for piece in cost.work}
    assert (by_name["gradients"], by_name["products"], by_name["checkpoints"]) == (3 * 23, 3 * 23 * 7, 3)


def test_models_that_exist_already_cost_nothing(run, tmp_path):
    attributor, method = attributor_of(run, tmp_path), Downsampling(n_models=4)
    new = dict.fromkeys(("before", "after"), 0.0)
    for when in new:
        (new[when],) = [
            piece.seconds for piece in attributor._cost(method, QUERIES).work if piece.what == "training models"
        ]
        attributor.score(method, QUERIES)
    assert new["before"] > 0
    assert new["after"] == 0


def test_pieces_end_when_the_accelerator_has_finished(monkeypatch):
    now, waiting = [0.0], [0.0]

    def finish():
        now[0] += waiting[0]
        waiting[0] = 0.0

    monkeypatch.setattr(timing, "synchronize", finish)
    monkeypatch.setattr(timing, "clock", lambda: now[0])
    waiting[0] = 7.0  # of something before
    work = iter([0.05, 0.03, 0.02])
    assert timing.timed(lambda: waiting.__setitem__(0, next(work))) == pytest.approx(0.03)
    assert next(work) == 0.02


def test_influence_limits_the_time_of_its_methods(tmp_path, monkeypatch):
    limits, score = [], Attributor.score

    def watched(self, *args, **kwargs):
        limits.append(self.limit_seconds)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(Attributor, "score", watched)
    influence = Influence([GradientDot()], queries=QUERIES, dirpath=tmp_path, max_cost=1e6, log_scores=False)
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[influence]).fit(Net(), DataLoader(TRAIN, 5))
    assert limits == [pytest.approx(1e6 * influence.attributor.trajectory.fit_seconds)]
    assert influence.attributor.limit_seconds is None


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("subject", ["adam", "cnn", "few", "logistic", "single", "table", "transformer"])
@pytest.mark.filterwarnings("ignore")
def test_estimates_hold_within_a_factor_of_four(subject, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    import costs

    # Seconds of the CPU, which other work on the machine hardly changes.
    monkeypatch.setattr(timing, "clock", time.process_time)
    wide = subject in ("cnn", "transformer")
    slow = ("HyDRA", "TracIn", "Arnoldi", "EKFAC exact ranks", "EKFAC relatif", "LeaveOneOut", "Downsampling")
    rows = {name: row for name, row in costs.ROWS.items() if not (wide and name in slow)}
    lines = costs.table([subject], rows, (None, None), share=20 if wide else 10)
    wrong = [str(line) for line in lines if line.off > 4]
    assert not wrong, "\n".join(
        ["subject, method, what, queries, seconds to estimate, estimated, taken, ratio", *wrong]
    )
    assert len(lines) >= 10
