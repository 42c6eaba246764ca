"""Projections: exact at full size, right on average below it, and the two sides of a layer drawn apart."""

import pytest
import torch

from lightning_influence.numerics.projections import (
    KroneckerSketch,
    PlainSketch,
    Projector,
    RandomProjection,
    split_dim,
)

LIKE = torch.zeros((), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(sketch, left, right):
    return sketch.rows(left).reshape(len(left), -1) @ sketch.rows(right).reshape(len(right), -1).T


@pytest.mark.parametrize("structure", ["kronecker", "plain"])
def test_full_rotations_keep_inner_products(structure):
    """Both sides at full size and orthogonal: no number changes."""
    projection = RandomProjection(12)
    if structure == "plain":
        sketch = PlainSketch(projection.frame(20, 20, "w"))
    else:
        sketch = KroneckerSketch(projection.frame(5, 5, "w/left"), projection.frame(4, 4, "w/right"))
    left, right = normal(3, 5, 4), normal(6, 5, 4, seed=1)
    assert float((sketch.rows(left).reshape(3, -1) - left.reshape(3, -1)).abs().max()) > 0.1  # it did turn
    torch.testing.assert_close(products(sketch, left, right), left.reshape(3, -1) @ right.reshape(6, -1).T)


@pytest.mark.parametrize("entries", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("structure", ["kronecker", "plain"])
def test_inner_products_are_right_on_average(structure, entries):
    """Over 1,000 seeds, within four of the mean's own standard errors, and these are small."""
    left, right = normal(2, 4, 5), normal(3, 4, 5, seed=1)
    found = torch.stack(
        [
            products(Projector(RandomProjection(6, structure, entries, seed))("w", (4, 5), LIKE), left, right)
            for seed in range(1000)
        ]
    )
    exact = left.flatten(1) @ right.flatten(1).T
    error = found.std(0) / len(found) ** 0.5
    size = left.flatten(1).norm(dim=1)[:, None] * right.flatten(1).norm(dim=1)
    assert bool((error < 0.03 * size).all())
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())


def test_two_sides_of_one_size_are_drawn_apart():
    """With the same matrix on both sides of a square weight, products would be biased."""
    sketch = Projector(RandomProjection(9, entries="gaussian"))("w", (6, 6), LIKE)
    assert not torch.equal(sketch.left, sketch.right)
    average = torch.zeros(6, 6, dtype=torch.float64)
    for seed in range(1000):
        drawn = Projector(RandomProjection(9, entries="gaussian", seed=seed))("w", (6, 6), LIKE)
        average += drawn.left.T @ drawn.right / 1000
    assert float(average.abs().max()) < 0.1


def test_the_same_seed_is_the_same_projection_and_another_parameter_is_not():
    one, again, other = (Projector(RandomProjection(4, seed=seed)) for seed in (0, 0, 1))
    same, twin, differs, elsewhere = (
        make(name, (6, 5), LIKE).left for make, name in ((one, "a"), (again, "a"), (other, "a"), (one, "b"))
    )
    assert torch.equal(same, twin)
    assert not torch.allclose(same, differs)
    assert not torch.allclose(same, elsewhere)


def test_drawing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    Projector(RandomProjection(4))("w", (6, 5), LIKE)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_small_stays_as_it_is():
    projector = Projector(RandomProjection(12))
    rows = normal(2, 3, 4)
    assert projector("w", (3, 4), LIKE).rows(rows) is rows
    assert projector("number", (), LIKE).rows(rows[:, 0, 0]).shape == (2,)
    assert projector("bias", (30,), LIKE).rows(normal(2, 30)).shape == (2, 12)
    narrow = projector("narrow", (2, 100), LIKE)
    assert narrow.left is None
    assert narrow.rows(normal(3, 2, 100)).shape == (3, 2, 6)


@pytest.mark.parametrize(
    ("dim", "rows", "columns", "kept"),
    [
        (16, 10, 10, (4, 4)),
        (16, 2, 100, (2, 8)),
        (16, 100, 2, (8, 2)),
        (1, 5, 5, (1, 1)),
        (10, 30, 30, (3, 3)),
        (9, 1, 30, (1, 9)),
    ],
)
def test_sides_share_the_numbers_there_are(dim, rows, columns, kept):
    assert split_dim(dim, rows, columns) == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "Expected `dim` to be a positive integer, got 0"),
        ((2.5,), "Expected `dim` to be a positive integer, got 2.5"),
        ((4, "dense"), "Expected `structure` to be one of 'kronecker', 'plain', got 'dense'"),
        ((4, "plain", "signs"), "Expected `entries` to be one of 'orthogonal', 'gaussian', got 'signs'"),
    ],
)
def test_other_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomProjection(*arguments)
