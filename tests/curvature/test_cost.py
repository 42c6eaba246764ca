"""What a plan counts for curvatures besides the passes over the examples."""

import pytest
import torch
from case import Step, both, mlp

from lightning_influence import (
    EKFAC,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    GradientDot,
    InfluenceFunction,
    LiSSA,
)

SIZE = 5 * 6 + 6 + 6 * 3 + 3  # parameters
PROBES, ITERATIONS, QUERIES = 32, 50, 4


def seconds(monkeypatch, **questions):
    """Where every piece of work that is timed takes a second."""
    for room in ("methods.method", "curvature.cost", "curvature.exact", "curvature.ekfac"):
        monkeypatch.setattr(f"lightning_influence.{room}.timed", lambda work: work() is None or 1.0)
    torch.manual_seed(0)
    data = both(5, n=24)
    train, queries = data["train"](), data["queries"]()
    attributor = Attributor(Step(mlp()).double(), train, batch_size=8)
    asked = None if questions.get("itself") else queries
    plain = attributor.cost(GradientDot(), asked)
    return attributor.cost(questions["method"], asked) - plain


@pytest.mark.parametrize(
    ("curvature", "products"),
    [
        (ConjugateGradient(), PROBES + ITERATIONS * QUERIES),
        (LiSSA(), PROBES + ITERATIONS * QUERIES),
        (Arnoldi(steps=20), PROBES + 20),
    ],
    ids=repr,
)
def test_products_count_for_every_vector_and_every_block(monkeypatch, curvature, products):
    # eight vectors with one block of eight in a second, three such blocks
    assert seconds(monkeypatch, method=InfluenceFunction(curvature)) == pytest.approx(products / 8 * 3)


def test_self_influence_solves_for_every_example(monkeypatch):
    found = seconds(monkeypatch, method=InfluenceFunction(ConjugateGradient()), itself=True)
    assert found == pytest.approx((PROBES + ITERATIONS * 24) / 8 * 3)


def test_a_dense_matrix_counts_a_product_a_parameter_and_its_factor(monkeypatch):
    assert seconds(monkeypatch, method=InfluenceFunction(ExactGGN())) == pytest.approx(SIZE / 8 * 3 + (SIZE / 512) ** 3)
    assert seconds(monkeypatch, method=InfluenceFunction(ExactGGN(max_parameters=3))) == 0


def test_ekfac_counts_two_passes_a_label_and_its_decompositions(monkeypatch):
    decomposed = sum((side / 256) ** 3 for side in (6, 5, 3, 6))
    for labels, passes in (("empirical", 2), ("exact", 2 * 3)):
        found = seconds(monkeypatch, method=InfluenceFunction(EKFAC(labels=labels)))
        assert found == pytest.approx(passes * 3 + decomposed)
