"""What a plan counts for curvatures besides the passes over the examples, and the limit of time of solvers."""

import pytest
import torch
from case import Step, both, mlp

from lightning_influence import (
    EKFAC,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    InfluenceFunction,
    LiSSA,
    timing,
)
from lightning_influence.curvature.watch import OutOfTime
from lightning_influence.gradients import Engine
from lightning_influence.gradients.products import Products

SIZE = 5 * 6 + 6 + 6 * 3 + 3  # parameters


def asked(**options):
    torch.manual_seed(0)
    data = both(5, n=24)
    return Attributor(Step(mlp()).double(), data["train"](), batch_size=8, **options), data["queries"]()


@pytest.fixture
def work(monkeypatch):
    """Counts vectors times examples in products, and examples in passes; estimates take them for seconds."""
    done = [0.0]

    def counting(whole, count):
        def counted(self, *args, **kwargs):
            done[0] += count(self, *args)
            return whole(self, *args, **kwargs)

        return counted

    def vectors(products, matrix, vectors, ids=None):
        return len(vectors) * len(products.examples if ids is None else ids)

    monkeypatch.setattr(Products, "times", counting(Products.times, vectors))
    monkeypatch.setattr(Engine, "gradients", counting(Engine.gradients, lambda engine, block, *_: block.size))
    monkeypatch.setattr(timing, "clock", lambda: done[0])
    return done


@pytest.mark.parametrize(
    ("curvature", "itself"),
    [
        (ConjugateGradient(1e-3, tolerance=1e-8), False),
        (ConjugateGradient(), True),
        (LiSSA(1e-2), False),
        pytest.param(LiSSA(1e-4, depth=150), False, marks=pytest.mark.slow),  # does not converge
        (Arnoldi(steps=20), False),
        (ExactGGN(), False),
        (ExactGGN(), True),
        (EKFAC(), False),
        (EKFAC(), True),
        (EKFAC(labels="sampled", corrected=False), False),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:The Neumann series did not converge")
def test_the_work_of_curvatures_is_counted(work, curvature, itself):
    attributor, queries = asked()
    method, queries = InfluenceFunction(curvature), None if itself else queries
    estimated, before = attributor.cost(method, queries), work[0]
    attributor.self_influence(method) if itself else attributor.score(method, queries)
    assert estimated == pytest.approx(work[0] - before, rel=0.5)


def test_a_matrix_that_is_too_large_takes_no_time(work):
    attributor, queries = asked()
    small = attributor.cost(InfluenceFunction(ExactGGN(max_parameters=3)), queries)
    assert small < attributor.cost(InfluenceFunction(ExactGGN()), queries) - SIZE * 24 / 2


# ---- the limit of time ----------------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second with each product."""
    ticks, whole = [0.0], Products.times

    def times(self, *args):
        ticks[0] += 1
        return whole(self, *args)

    monkeypatch.setattr(Products, "times", times)
    monkeypatch.setattr(timing, "clock", lambda: ticks[0])
    return ticks


SOLVERS = [ConjugateGradient(1e-2, tolerance=1e-6), LiSSA(0.1, tolerance=1e-6)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solver_stops_at_the_limit_with_what_it_found(ticking, solver):
    attributor, queries = asked()
    whole = attributor.score(InfluenceFunction(solver), queries)
    limit = ticking[0] - 0.4 * whole.diagnostics["solver_iterations"]
    attributor.limit_seconds = limit
    with pytest.warns(
        UserWarning, match=r"was stopped at the limit of time after \d+ iterations.*`Attributor.limit_seconds`"
    ) as said:
        part = attributor.score(InfluenceFunction(solver), queries)
    assert len(said) == 1
    assert part.diagnostics["solver_iterations"] < whole.diagnostics["solver_iterations"]
    assert 1e-6 < part.diagnostics["solver_residual"] < 0.5
    assert any("stopped at the limit" in note for note in part.notes)
    error = (part.values - whole.values).norm() / whole.values.norm()
    assert 1e-9 < error < 0.5
    attributor.limit_seconds = None
    assert torch.equal(attributor.score(InfluenceFunction(solver), queries).values, whole.values)


def test_a_limit_before_there_is_anything_of_use_raises(ticking):
    attributor, queries = asked()
    attributor.limit_seconds = 0.5
    with pytest.raises(
        OutOfTime, match=r"within the limit of time, got a residual of .* after 1 iteration\..*max_cost"
    ):
        attributor.score(InfluenceFunction(ConjugateGradient(1e-6)), queries)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solver_shows_how_far_it_is(monkeypatch, solver):
    attributor, queries = asked()
    shown = []
    with attributor.session(queries) as setting:

        class Bar:
            def __init__(self, total, label, unit="example"):
                shown.append((label, []))

            def __enter__(self):
                return shown[-1][1].append

            def __exit__(self, *error):
                pass

        setting.progress = Bar
        solver.solve(solver.prepare(setting), setting.queries.gradients(), setting, torch.tensor([solver.damping]))
    (made,) = [made for label, made in shown if "solving" in label]
    assert sum(made) == 100
    assert len([part for part in made if part]) > 5
