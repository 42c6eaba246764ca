"""Minima of linear heads against dense Newton steps, in every shape, and how many passes over the data they take."""

import oracles_heads
import pytest
import torch
from torch.nn import functional as F

from lightning_influence.numerics import head_preconditioner, penalised_head
from lightning_influence.numerics.heads import Link
from lightning_influence.numerics.penalised_head import PenalisedHead

torch.set_num_threads(1)


def cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def binary(z, y):
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)


def squared(z, y):
    return (z - y).square().mean(1)


# kind -> loss of logits and targets, its scale, targets of logits
KINDS = {
    "softmax": (cross_entropy, lambda c: 1.0, lambda z: F.one_hot(z.argmax(1), z.shape[1]).double()),
    "soft labels": (cross_entropy, lambda c: 1.0, lambda z: (3 * z).softmax(1)),
    "sigmoid": (binary, lambda c: 1.0, lambda z: (z > 0).double()),
    "identity": (squared, lambda c: 2 / c, lambda z: z + torch.randn(z.shape).double()),
}
# shape -> examples, features, classes, rank of the features
SHAPES = {
    "many examples": (60, 4, 3, 4),
    "more features than examples": (7, 30, 3, 7),
    "rank-deficient": (40, 12, 2, 5),
    "many classes": (30, 3, 20, 3),
    "two examples": (2, 3, 2, 3),
}


def problem(kind, shape, seed=0, size=7):
    """The loss, features, targets, a start, and a `PenalisedHead` of them given λ."""
    torch.manual_seed(seed)
    n, dim, classes, rank = SHAPES[shape]
    loss, scale, targets_of = KINDS[kind]
    scales = 0.7 ** torch.arange(rank)
    features = (torch.randn(n, rank) * scales @ torch.randn(rank, dim) + 0.5).double()
    targets = targets_of(features @ torch.randn(dim, classes).double() / dim**0.5)
    link = Link({"soft labels": "softmax"}.get(kind, kind), scale(classes))

    def rows():
        return zip(features.split(size), targets.split(size), strict=True)

    start = torch.randn(classes, dim).double()
    return loss, features, targets, start, lambda weight_decay: PenalisedHead(rows, link, weight_decay)


def close_to_minimum(made, weight_decay, tolerance=1e-9):
    loss, features, targets, start, head = made
    found = head(weight_decay).fit(start)
    expected = oracles_heads.minimum(loss, found.weight, features, targets, weight_decay)
    assert found.converged
    difference = float((found.weight - expected).norm())
    assert difference <= tolerance * float(expected.norm()), f"{difference} of {float(expected.norm())}"
    return found


@pytest.mark.parametrize("weight_decay", [0.3, 0.006, 1e-5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_minima_are_those_of_dense_newton_steps(kind, shape, weight_decay):
    close_to_minimum(problem(kind, shape), weight_decay)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (head_preconditioner, "_ROTATED", 2),
        (head_preconditioner, "_NUMBERS", 30),
        (head_preconditioner, "_BLOCK", 16),
        (penalised_head, "_KEPT", 40),
        (penalised_head, "_MOST_PRODUCTS", 5),
    ],
)
def test_no_bound_on_memory_changes_the_minimum(kind, module, name, value, monkeypatch):
    monkeypatch.setattr(module, name, value)
    close_to_minimum(problem(kind, "many examples"), 0.006)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_approximate_inverse_is_exact_where_the_block_takes_all_directions(kind):
    loss, features, targets, start, head = problem(kind, "many examples")
    objective = head(1e-3)
    inverse = head_preconditioner.Preconditioner(objective.rows, objective.link, objective.weight_decay).at(start)
    assert inverse.exact == 4
    hessian = torch.autograd.functional.hessian(
        lambda w: oracles_heads.objective(loss, w.view(start.shape), features, targets, 1e-3), start.flatten()
    )
    right = torch.randn(start.shape).double()
    torch.testing.assert_close(inverse(right).flatten(), torch.linalg.solve(hessian, right.flatten()))
    torch.testing.assert_close(objective.hessian(start)(right).flatten(), hessian @ right.flatten())


@pytest.mark.parametrize(("kind", "most"), [("softmax", 90), ("sigmoid", 90), ("identity", 2)])
def test_few_products_with_the_hessian_where_features_are_like_images(kind, most, monkeypatch):
    # As many as 300 with the features' second moment as the preconditioner.
    torch.manual_seed(0)
    n, dim, classes = 400, 80, 6
    features = (torch.randn(n, dim) * torch.arange(1, dim + 1) ** -1.0 * 10 @ torch.randn(dim, dim)).relu().double()
    features = features / features.norm(dim=1).mean() * 9
    targets = KINDS[kind][2](features @ torch.randn(dim, classes).double())
    products = []
    one = PenalisedHead.hessian

    def counted(head, weight):
        product = one(head, weight)
        return lambda direction: products.append(1) or product(direction)

    monkeypatch.setattr(PenalisedHead, "hessian", counted)
    found = PenalisedHead(lambda: iter([(features, targets)]), Link(kind), 0.006).fit(
        torch.zeros(classes, dim).double()
    )
    assert found.converged
    assert len(products) <= most


def test_a_sample_of_the_examples_is_evenly_spread(monkeypatch):
    monkeypatch.setattr(head_preconditioner, "_NUMBERS", 40)
    rows = torch.arange(101.0).view(-1, 1).expand(-1, 2)
    features, count = head_preconditioner._sample(lambda: ((block, None) for block in rows.split(9)))
    assert count == 101
    assert 10 <= len(features) <= 20
    assert set(features[:, 0].diff().tolist()) == {8.0}


@pytest.mark.parametrize(
    ("kind", "weight_decay"), [("softmax", 0.006), ("softmax", 1e-4), ("sigmoid", 0.006), ("identity", 0.1)]
)
def test_the_number_of_passes_is_foreseen(kind, weight_decay, monkeypatch):
    torch.manual_seed(1)
    features = (torch.randn(300, 60) * torch.arange(1, 61) ** -1.0 * 8).double()
    targets = KINDS[kind][2](features @ torch.randn(60, 5).double())
    made = []

    def rows():
        made.append(1)
        return iter([(features, targets)])

    PenalisedHead(rows, Link(kind), weight_decay).fit(torch.zeros(5, 60).double())
    assert len(made) / 4 <= penalised_head.passes(Link(kind), weight_decay) <= 4 * len(made)


def test_no_examples_are_named():
    with pytest.raises(ValueError, match="Expected at least one training example, got none"):
        PenalisedHead(lambda: iter(()), Link("identity"), 0.1).fit(torch.zeros(1, 2).double())
