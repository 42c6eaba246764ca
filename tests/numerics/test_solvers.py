"""Solvers against dense algebra, and the ways in which they stop."""

import pytest
import torch

from lightning_influence.numerics import solvers
from lightning_influence.numerics.dense import SingularError, factorise

torch.set_num_threads(1)


def matrix(eigenvalues, seed=0):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=drawn(seed), dtype=torch.float64))[0]
    return basis * values @ basis.T


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def right(count, size, seed=1):
    return torch.randn(count, size, generator=drawn(seed), dtype=torch.float64)


def times(dense):
    return lambda vectors: vectors @ dense


SPREAD = torch.logspace(-2, 1, 12, dtype=torch.float64)


def test_conjugate_gradients_equal_the_dense_solve_for_every_right_hand_side():
    a, b = matrix(SPREAD), right(3, 12)
    b[1] = 0
    found = solvers.conjugate_gradient(times(a), b, 1e-12, 100)
    torch.testing.assert_close(found.vectors, torch.linalg.solve(a, b.T).T, rtol=1e-8, atol=1e-9)
    assert float(found.residuals.max()) < 1e-11
    assert found.residuals[1] == 0
    assert not found.indefinite.any()


def test_conjugate_gradients_do_not_see_the_other_right_hand_sides():
    a, b = matrix(SPREAD), right(3, 12)
    together = solvers.conjugate_gradient(times(a), b, 1e-4, 100)
    alone = [solvers.conjugate_gradient(times(a), row[None], 1e-4, 100) for row in b]
    torch.testing.assert_close(together.vectors, torch.cat([one.vectors for one in alone]))
    assert together.iterations == max(one.iterations for one in alone)


def test_conjugate_gradients_stop_short_and_tell_the_true_residual():
    a, b = matrix(SPREAD), right(2, 12)
    found = solvers.conjugate_gradient(times(a), b, 1e-12, 3)
    assert found.iterations == 3
    expected = torch.linalg.vector_norm(b - found.vectors @ a, dim=1) / torch.linalg.vector_norm(b, dim=1)
    torch.testing.assert_close(found.residuals, expected)
    assert float(found.residuals.min()) > 1e-3


def test_conjugate_gradients_do_not_believe_their_running_residual():
    """In float32 and badly conditioned, it goes on falling where b - A x no longer does."""
    a = matrix(torch.logspace(-7, 0, 12)).float()
    b = right(2, 12).float()
    found = solvers.conjugate_gradient(times(a), b, 1e-7, 3000)
    expected = torch.linalg.vector_norm(b - found.vectors @ a, dim=1) / torch.linalg.vector_norm(b, dim=1)
    torch.testing.assert_close(found.residuals, expected, rtol=1e-3, atol=0)
    assert float(found.residuals.max()) > 1e-5


def test_conjugate_gradients_notice_negative_curvature_of_the_row_that_meets_it():
    a = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0], [0.1, 0.1, 1.0]], dtype=torch.float64)
    found = solvers.conjugate_gradient(times(a), b, 1e-10, 20)
    assert found.indefinite.tolist() == [False, True]
    torch.testing.assert_close(found.vectors[0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_the_accelerated_series_converges_in_the_square_root_of_the_terms():
    a, b = matrix(SPREAD), right(3, 12)
    b[2] = 0
    found = solvers.accelerated_neumann(times(a), b, 0.01, 10.0, 1e-8, 2000)
    torch.testing.assert_close(found.vectors, torch.linalg.solve(a, b.T).T, rtol=1e-5, atol=1e-6)
    assert found.iterations < 400  # the plain series takes about 18 / 0.001
    assert float(found.residuals.max()) <= 1e-8
    assert not found.diverged.any()


def test_an_eigenvalue_beyond_the_scale_stops_the_series_with_its_best_iterate():
    a, b = matrix([*SPREAD[:-1], 50.0]), right(2, 12)
    found = solvers.accelerated_neumann(times(a), b, 0.01, 10.0, 1e-8, 2000)
    assert found.diverged.all()
    assert found.vectors.isfinite().all()
    assert found.iterations < 100
    assert float(found.residuals.max()) <= 1.0


@pytest.mark.parametrize("values", [SPREAD, -SPREAD, torch.tensor([1.0, 3.0]), torch.zeros(3)])
def test_the_scale_is_a_bound_close_to_the_largest_magnitude(values):
    a, largest = matrix(values), float(values.abs().max())
    found = solvers.largest_eigenvalue(times(a), a[0], seed=3)
    assert largest * (1 - 1e-3) <= found <= largest * 1.05


def test_the_scale_is_a_bound_where_power_iteration_stops_early():
    a = matrix(SPREAD)
    for seed in range(5):
        assert solvers.largest_eigenvalue(times(a), a[0], seed, tolerance=0.2) >= 10.0


def clustered():
    """Many eigenvalues just below the largest, of which a random start has next to nothing."""
    values = torch.cat([torch.linspace(-0.1, 0.8, 300, dtype=torch.float64), torch.full((300,), 0.81).double()])
    values = torch.cat([values, torch.tensor([0.894], dtype=torch.float64)])
    start = solvers._normal(values, 1, 0)[0]
    start /= start.norm()
    last = torch.zeros_like(values)
    last[-1] = 1
    away = last - (last @ start) * start + 1e-3 * start  # almost at right angles to the first iterate
    mirror = away / away.norm() - last
    mirror /= mirror.norm()
    turn = torch.eye(len(values)).double() - 2 * torch.outer(mirror, mirror)
    return turn @ torch.diag(values) @ turn


def test_lanczos_bounds_the_spectrum_where_power_iteration_stops_inside():
    a = clustered()
    assert solvers.largest_eigenvalue(times(a), a[0], seed=0) * 1.05 < 0.894
    low, high = solvers.eigenvalue_bounds(times(a), a[0], seed=0)
    assert 0.894 <= high <= 0.96
    assert -0.3 <= low <= -0.1


@pytest.mark.parametrize("values", [SPREAD, -SPREAD, torch.tensor([1.0, 3.0]), torch.zeros(3)])
def test_lanczos_bounds_are_close_to_the_eigenvalues(values):
    a = matrix(values)
    low, high = solvers.eigenvalue_bounds(times(a), a[0], seed=3)
    scale = 1e-9 + 0.05 * float(values.max() - values.min())
    assert values.min() - scale <= low <= values.min() + 1e-9
    assert values.max() - 1e-9 <= high <= values.max() + 1.1 * scale


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_scale_and_is_not_asked_again(value):
    asked = []

    def product(vectors):
        asked.append(1)
        return torch.full_like(vectors, value)

    found = solvers.largest_eigenvalue(product, torch.zeros(4), seed=0)
    assert found != found or found == float("inf")
    assert len(asked) == 1


def test_the_mean_diagonal_is_estimated_and_repeats():
    a = matrix(SPREAD)
    found = solvers.mean_diagonal(times(a), a[0], seed=0, probes=2000)
    assert found == pytest.approx(float(a.diagonal().mean()), rel=0.05)
    assert solvers.mean_diagonal(times(a), a[0], 0) == solvers.mean_diagonal(times(a), a[0], 0)
    exact = torch.diag(SPREAD)
    assert solvers.mean_diagonal(times(exact), a[0], 0, 1) == pytest.approx(float(SPREAD.mean()))


def test_the_krylov_space_of_full_dimension_holds_the_whole_matrix():
    a = matrix(torch.logspace(-6, 4, 40, dtype=torch.float64))
    values, vectors = solvers.lanczos(times(a), a[0], 40, 0)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T * values @ vectors, a, rtol=0, atol=1e-10)


def test_the_krylov_space_sees_a_repeated_eigenvalue_once():
    a = matrix([1.0, 1.0, 1.0, 2.0, 5.0])
    values, vectors = solvers.lanczos(times(a), a[0], 5, 0)
    assert len(values) == len(vectors) == 3
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))


def test_orthogonality_survives_a_spectrum_that_a_single_pass_loses():
    a = matrix([*torch.linspace(1e-8, 1e-6, 60, dtype=torch.float64), 1e4])
    _, vectors = solvers.lanczos(times(a), a[0], 50, 0)
    eye = torch.eye(len(vectors), dtype=torch.float64)
    torch.testing.assert_close(vectors @ vectors.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]])
def test_a_dense_matrix_is_factored_for_many_solves(values):
    a, b = matrix(values), right(4, 3)
    found = factorise(a, 1e-16)
    assert found.positive is (min(values) > 0)
    torch.testing.assert_close(found.solve(b), torch.linalg.solve(a, b.T).T)
    torch.testing.assert_close(found.inverse, torch.linalg.inv(a))


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [1e-9, 1.0, 2.0], [-1e-9, 1.0, 2.0], [0.0, 0.0, 0.0]])
def test_a_singular_matrix_is_refused_by_the_precision_of_its_entries(values):
    with pytest.raises(SingularError):
        factorise(matrix(values), 1e-7)
    if min(map(abs, values)) > 0:
        factorise(matrix(values), 1e-16)
