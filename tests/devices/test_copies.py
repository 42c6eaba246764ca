"""What comes from a device together, and passes that write into tensors where nothing shows it."""

import pytest
import torch

import devices
from devices.fits_on import Net, data, fitted, trainer
from lightning_influence import Attributor, TracInCP
from lightning_influence.devices import Readings, on_device, on_host, read_numbers
from lightning_influence.numerics.dense import eigenpairs

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
HERE = devices.HERE


def test_tensors_of_all_types_come_in_one_copy_as_they_are():
    kinds = [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.float64]
    tensors = [torch.tensor([[1, 0, 3], [0, 5, 6]]).to(kind).T for kind in kinds]
    tensors += [torch.tensor(2**53 + 1), torch.empty(0, 2), torch.tensor(float("nan")), torch.tensor(True)]
    there = [tensor.to(HERE) for tensor in tensors]
    with devices.counted() as counts:
        found = on_host(there)
    assert counts.waits == 1
    for one, other in zip(found, tensors, strict=True):
        assert one.is_cpu
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_tensors_of_all_types_reach_a_device_in_one_copy_as_they_are():
    kinds = [torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64]
    tensors = [torch.tensor([[1, 0, 3], [0, 5, 6]]).to(kind).T for kind in kinds] + [torch.tensor(2.5)]
    with devices.counted() as counts:
        found = list(on_device(tensors, torch.device(HERE)))
    assert not devices.IS_STANDIN or (counts.to_device, counts.pageable) == (1, 0)
    for one, other in zip(found, tensors, strict=True):
        assert one.stride() == other.stride()
        assert one.untyped_storage().nbytes() == other.nbytes  # none keeps the others in memory
        assert str(one.device) == HERE
        assert torch.equal(one.cpu(), other)


@devices.standin_only
def test_large_tensors_are_copied_when_it_is_their_turn():
    arriving = on_device([torch.ones(2**20), torch.ones(2), torch.zeros(2**20)], torch.device(HERE))
    with devices.counted() as counts:
        next(arriving)
    assert counts.to_device == 2  # the small one with the first large one
    assert [float(each[0]) for each in arriving] == [1, 0]


def test_large_tensors_are_copied_alone_and_those_of_the_cpu_not_at_all():
    here = torch.ones(3)
    large, alike, small = torch.ones(2**20).to(HERE), torch.arange(3).to(HERE) + 1j, here.to(HERE)
    with devices.counted() as counts:
        found = on_host([here, large, alike, small])
    assert found[0].data_ptr() == here.data_ptr()
    assert counts.waits == 3
    assert read_numbers([alike.real, here]) == [[0, 1, 2], [1, 1, 1]]


def test_what_waits_is_read_with_what_is_needed_first():
    readings = Readings()
    first, second = readings.later(torch.ones(2).to(HERE)), readings.arriving(torch.zeros(1).to(HERE))
    third = torch.tensor(3).to(HERE)
    with devices.counted() as counts:
        assert readings.read([third]) == [[3]]
        assert first() == [1, 1]
        assert second().tolist() == [0]
    assert counts.waits == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE"), torch.OutOfMemoryError]
)
def test_a_solver_that_fails_on_the_device_is_replaced_by_that_of_the_cpu(monkeypatch, error):
    eigh, matrix = torch.linalg.eigh, torch.randn(600, 600, generator=torch.Generator().manual_seed(0)).double()

    def fails(matrix):
        if not matrix.is_cpu:
            raise error
        return eigh(matrix)

    matrix = matrix + matrix.T
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigenpairs(matrix.to(HERE))
    assert str(values.device) == HERE
    torch.testing.assert_close((vectors * values @ vectors.T).cpu(), matrix)


class WritesSilently(Net):
    """Its loss grows from pass to pass, before some step, by a write that no version shows."""

    def __init__(self, until):
        super().__init__()
        self.until = until
        self.register_buffer("scale", torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.scale
        if not self.training and self.global_step < self.until:
            self.scale.data.mul_(1.5)
        return loss


@pytest.mark.parametrize("until", [100, 6], ids=["in all passes", "at earlier checkpoints"])
def test_silent_writes_are_put_back_or_refused_once(until, tmp_path):
    _, train, influence = fitted(tmp_path, torch.float32, net=WritesSilently(until))
    modules = {where: WritesSilently(until) for where in ("cpu", HERE)}  # of which nothing is known yet

    def scored(where):
        about = {"trainer": trainer(where), "check_data": False}
        return Attributor(modules[where], train, influence.trajectory, **about).score(TracInCP(), queries).values

    queries = data(3, 2, torch.float32)
    expected = scored("cpu")
    if until == 6:
        with pytest.raises(RuntimeError, match=r"got a first write into .* Ask again"):
            scored(HERE)
    torch.testing.assert_close(scored(HERE), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
