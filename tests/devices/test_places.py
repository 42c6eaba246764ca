"""Where modules are scored, and that what is written names no device."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

import devices
from devices.fits_on import Net, data, fitted, trainer
from lightning_influence import EKFAC, Attributor, ExactGGN, GradientDot, HyDRA, Influence, InfluenceFunction, TracInCP
from lightning_influence.timing import timed

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
HERE, OTHER = devices.HERE, devices.OTHER
two_devices = pytest.mark.skipif(torch.accelerator.device_count() == 1, reason="needs two devices")


class Watched(Net):
    """Writes down the devices of its batches."""

    def training_step(self, batch, batch_idx):
        SEEN.add(str(batch[0].device))
        return super().training_step(batch, batch_idx)


SEEN = set()


def seen_by(module, **options):
    SEEN.clear()
    Attributor(module, data(6, 1, torch.float32), **options).score(GradientDot(), data(2, 2, torch.float32))
    return SEEN


@pytest.mark.parametrize("place", ["cpu", HERE, pytest.param(OTHER, marks=two_devices)])
def test_a_module_is_scored_where_it_is(place):
    module = Watched().to(place)
    assert seen_by(module) == {place}
    assert {str(p.device) for p in module.parameters()} == {place}


@two_devices
def test_a_module_made_on_a_device_is_scored_there():
    with torch.device(OTHER):
        module = Watched()
    assert seen_by(module) == {OTHER}


@two_devices
def test_a_trainers_device_comes_first_and_the_module_goes_back():
    module = Watched().to(OTHER)
    assert seen_by(module, trainer=trainer(HERE)) == {HERE}
    assert {str(p.device) for p in module.parameters()} == {OTHER}


def test_files_of_a_fit_on_a_device_name_none(tmp_path):
    options = {"methods": [HyDRA.during_fit(), TracInCP()], "queries": data(2, 2, torch.float32)}
    fitted(tmp_path, torch.float32, HERE, **options)
    files = [path for path in tmp_path.rglob("*.pt") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert HERE.split(":")[0].encode() not in path.read_bytes()


@pytest.mark.parametrize("method", [InfluenceFunction(EKFAC()), InfluenceFunction(ExactGGN(damping=0.1))], ids=str)
def test_a_stored_curvature_is_read_on_another_device(method, dtype, tmp_path):
    module, train, influence = fitted(tmp_path, dtype)
    queries, found = data(3, 2, dtype), []
    for where in (HERE, HERE, "cpu"):
        ask = Attributor(module, train, influence.trajectory, trainer=trainer(where))
        found.append(ask.score(method, queries).values)
    assert len([path for path in tmp_path.rglob("curvature/*") if path.is_file()]) == 1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_the_lines_for_later_name_the_method_and_the_trainer(tmp_path, capsys):
    torch.manual_seed(0)
    method = InfluenceFunction(EKFAC(), normalize="relatif")
    influence = Influence([method], data(2, 2, torch.float32), tmp_path, max_cost=1e-9, log_scores=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(HERE, callbacks=[influence]).fit(Net(), DataLoader(data(8, 1, torch.float32), 4))
    (lines,) = [str(w.message) for w in caught if "Attributor(" in str(w.message)]
    assert "attributor.score(InfluenceFunction(curvature=EKFAC(), normalize='relatif')" in lines
    assert "trainer=trainer" in lines


@devices.standin_only
def test_estimates_wait_for_the_device():
    runs = []
    with devices.counted() as counts:
        timed(lambda: runs.append(torch.ones(3, device=HERE) + 1))
    assert counts.synchronisations == 2 * len(runs) >= 4  # before and after each
