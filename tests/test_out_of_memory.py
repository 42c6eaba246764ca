"""Where memory does not suffice for a block, smaller ones give the same scores, and a note says their size."""

import pytest
import pytorch_lightning as pl
import torch
from fits import seeded
from torch.utils.data import TensorDataset

from lightning_influence import EKFAC, Attributor, ExactGGN, GradientDot, InfluenceFunction, KNNShapley
from lightning_influence.attribution.out_of_memory import is_out_of_memory

N = 150


class Hungry(pl.LightningModule):
    """Batches of more than ``most`` examples do not fit in memory."""

    def __init__(self, most=N):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).double()
        self.most, self.calls = most, 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        if len(x) > self.most:
            torch.empty(2**60, dtype=torch.uint8)
        return torch.nn.functional.cross_entropy(self.layer(x), y)


def data(n=N):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 2, (n,), generator=generator))


def attributor(most, batch_size=128):
    return Attributor(seeded(Hungry, most), data(), batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "most", "size"),
    [(GradientDot(), 70, 64), (GradientDot(), 50, 32), (GradientDot(), 32, 32), (InfluenceFunction(EKFAC()), 70, 64)],
)
def test_blocks_are_halved_until_they_fit(method, most, size):
    found, expected = (attributor(m).score(method, data(7)) for m in (most, N))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-14)
    note = f"Memory did not suffice for blocks of 128 examples: they were scored in blocks of {size}"
    assert [n for n in found.notes if n.startswith(note)]
    assert not [n for n in expected.notes if "Memory" in n]


def test_self_influence_as_well():
    found, expected = (attributor(m).self_influence(GradientDot()) for m in (32, N))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-14)
    assert "blocks of 32 (`batch_size=`)" in " ".join(found.notes)


@pytest.mark.parametrize("method", [GradientDot(), KNNShapley()], ids=lambda m: m.name)
def test_blocks_of_queries_as_well(method):
    found, expected = (attributor(m, 16).score(method, data(100)) for m in (8, N))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-14)
    assert "blocks of 8 (`batch_size=`)" in " ".join(found.notes)


def test_the_influence_of_a_group_as_well():
    method = InfluenceFunction(ExactGGN(damping=0.1))
    found, expected = (attributor(m, 64).group(method, [1, 40], data(40)) for m in (32, N))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_one_example_that_does_not_fit_is_an_error():
    module = seeded(Hungry, N)
    asking = Attributor(module, data(), batch_size=128)
    asking.score(GradientDot(), data(7))
    module.most = 0
    with pytest.raises((RuntimeError, ValueError), match="can't allocate memory"):
        asking.score(GradientDot(), data(7))


def test_other_errors_are_raised_at_once():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    )
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(MemoryError("Unable to allocate 2 GiB for an array"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
