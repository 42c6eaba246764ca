"""Where modules are scored, and that what is written names no device."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import devices
from devices.fits_on import Net, data, fitted, trainer
from lightning_influence import (
    EKFAC,
    Attributor,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    Refit,
    RepresenterPoints,
    TracInCP,
)
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


class MakesTensors(Net):
    """Makes tensors where and in the type that it says it is."""

    def training_step(self, batch, batch_idx):
        zeros = torch.zeros_like(batch[0], device=self.device, dtype=self.dtype)
        assert zeros.dtype is next(self.parameters()).dtype
        return super().training_step((batch[0] + zeros, batch[1]), batch_idx)


@pytest.mark.parametrize("precision", [None, "32-true", "bf16-true"])
def test_a_module_says_where_and_in_which_type_it_is_scored(precision):
    module = MakesTensors().double()
    ask = Attributor(module, data(6, 1, torch.float64), trainer=trainer(HERE), precision=precision)
    assert ask.score(GradientDot(), data(2, 2, torch.float64)).values.any()
    assert (str(module.device), module.dtype) == ("cpu", torch.float64)


class NamesNoIndex(Net):
    """Makes tensors on the current device of a kind."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + torch.zeros_like(x, device=x.device.type), y), batch_idx)


@two_devices
@pytest.mark.parametrize("place", [HERE, OTHER])
def test_the_device_of_scoring_is_the_current_one_meanwhile(place):
    module, before = NamesNoIndex(), torch.accelerator.current_device_index()
    ask = Attributor(module, data(6, 1, torch.float32), trainer=trainer(place))
    assert ask.score(GradientDot(), data(2, 2, torch.float32)).values.any()
    assert torch.accelerator.current_device_index() == before


def on_device(dataset):
    return TensorDataset(*[tensor.to(HERE) for tensor in dataset.tensors])


@pytest.mark.parametrize("method", [TracInCP(), KNNShapley(), RepresenterPoints(), LeaveOneOut((0, 3))], ids=str)
@pytest.mark.parametrize("moved", ["the dataset", "by the loader"])
def test_data_may_be_on_the_device_already(method, moved, tmp_path):
    train, queries = data(14, 1, torch.float64), data(3, 2, torch.float64)
    there = moved == "the dataset"
    collate = None if there else lambda items: [part.to(HERE) for part in default_collate(items)]
    loader = DataLoader(on_device(train) if there else train, 4, collate_fn=collate)
    module, found = MakesTensors().double(), []
    influence = Influence(dirpath=tmp_path, log_scores=False)
    trainer(HERE, callbacks=[influence]).fit(module, loader)
    for n, (data_, asked, where) in enumerate(((loader, on_device(queries), HERE), (train, queries, "cpu"))):
        about = {"trainer": trainer(where), "refit": Refit(dirpath=tmp_path / str(n))}
        found.append(Attributor(module, data_, influence.trajectory, **about).score(method, asked).values)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_ids_may_be_on_the_device():
    module, train = Net(), data(6, 1, torch.float32)
    scores = Attributor(module, train).score(GradientDot(), data(2, 2, torch.float32))
    ids = torch.tensor([1, 4])
    assert torch.equal(scores.group(ids.to(HERE)), scores.group(ids))
    assert torch.equal(scores.proponents(2, query=ids[0].to(HERE)).ids, scores.proponents(2, query=1).ids)
    assert LeaveOneOut(ids.to(HERE)).examples == (1, 4)


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


def test_what_is_computed_on_the_cpu_beside_a_device_is_noted():
    noted = []
    for options in ({}, {"trainer": trainer(HERE)}, {"trainer": trainer("cpu")}):
        ask = Attributor(Net(), data(6, 1, torch.float32), **options)
        notes = ask.score(GradientDot(), data(2, 2, torch.float32)).notes
        noted.append(any("Computed on the CPU" in note and "`trainer=`" in note for note in notes))
    assert noted == [True, False, False]


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
