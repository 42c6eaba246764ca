"""Eigenvectors of symmetric matrices, also where LAPACK fails in float32."""

import pytest
import torch

from lightning_influence.numerics.dense import eigenpairs

LAPACK = torch.linalg.eigh


def raises(matrix):
    if matrix.dtype is torch.float32:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")
    return LAPACK(matrix)


def gives_nan(matrix):
    values, vectors = LAPACK(matrix)
    return (
        (values.index_fill(0, torch.tensor([1]), torch.nan), vectors)
        if matrix.dtype is torch.float32
        else (values, vectors)
    )


@pytest.mark.parametrize("fails", [raises, gives_nan])
def test_float32_that_fails_is_computed_in_float64(monkeypatch, fails):
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigenpairs(rows.T @ rows)
    assert values.dtype is vectors.dtype is torch.float32
    torch.testing.assert_close(vectors * values @ vectors.T, rows.T @ rows, atol=1e-5, rtol=0)


def test_a_matrix_with_nan_has_no_eigenvalues():
    values, vectors = eigenpairs(torch.eye(3).fill_(torch.nan))
    assert values.isnan().all()
    assert vectors.isnan().all()


def test_one_that_never_converges_raises(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: LAPACK(torch.full_like(matrix, torch.inf)))
    with pytest.raises(ArithmeticError, match="width 2"):
        eigenpairs(torch.eye(2))
