"""Each method on the stand-in device, with and without float64, gives the scores of the CPU."""

import itertools

import pytest
import torch

import devices
from devices.fits_on import Net, data, fitted, trainer
from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    Downsampling,
    ExactGGN,
    ExactHessian,
    GradientDot,
    HyDRA,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    LiSSA,
    RandomProjection,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    TracInIdeal,
)

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
HERE = devices.HERE
METHODS = {
    "TracInCP": TracInCP(),
    "GradientDot": GradientDot(),
    "cosine": GradientDot(normalize="cosine"),
    "projected": TracInCP(projection=RandomProjection(8)),
    "TracIn": TracIn(),
    "EKFAC": InfluenceFunction(EKFAC()),
    "ExactHessian": InfluenceFunction(ExactHessian(damping=0.5)),
    "ExactGGN": InfluenceFunction(ExactGGN(damping=0.1)),
    "ConjugateGradient": InfluenceFunction(ConjugateGradient(damping=0.1)),
    "LiSSA": InfluenceFunction(LiSSA(damping=0.5)),
    "Arnoldi": InfluenceFunction(Arnoldi(damping=0.1, steps=10)),
    "HyDRA": HyDRA(),
    "HyDRA renormalized": HyDRA(removal="renormalize", hessian=False),
    "SOURCE": SOURCE(segments=2),
    "SOURCE exact": SOURCE(segments=1, curvature=ExactGGN()),
    "KNNShapley": KNNShapley(),
    "RepresenterPoints": RepresenterPoints(),
    "LeaveOneOut": LeaveOneOut(examples=(0, 3)),
    "Downsampling": Downsampling(n_models=6),
}
TRACKED = {
    "TracInIdeal": TracInIdeal(),
    "hypergradients": HyDRA.during_fit(),
    "hypergradients in a file": HyDRA.during_fit(memory=1),
    "visits": HyDRA.during_fit(hessian=False),
}


@pytest.fixture(autouse=True)
def _deterministic_operations_only():
    """As users may demand; a GPU would also want cuBLAS set up for it."""
    torch.use_deterministic_algorithms(devices.IS_STANDIN)
    yield
    torch.use_deterministic_algorithms(False)


def asked(module, train, influence, method, device, folder, precision=None):
    refit = Refit(dirpath=folder) if isinstance(method, (LeaveOneOut, Downsampling)) else None
    about = {"trainer": trainer(device), "refit": refit, "batch_size": 5, "precision": precision}
    ask = Attributor(module, train, influence.trajectory, **about)
    queries = data(3, 2, train.tensors[0].dtype)
    return ask.score(method, queries).values


def assert_same(found, expected, dtype):
    allowed = 1e-9 if dtype is torch.float64 else 1e-3
    assert found.device.type == "cpu"
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed * float(expected.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_scores_on_the_device_are_those_of_the_cpu(name, dtype, tmp_path):
    about = fitted(tmp_path / "runs", dtype)
    on_device, on_cpu = (asked(*about, METHODS[name], where, tmp_path / where) for where in (HERE, "cpu"))
    assert_same(on_device, on_cpu, dtype)


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "bf16-mixed") for name in METHODS), *itertools.product(("TracInCP", "EKFAC"), ("bf16-true", "16-mixed"))],
)
def test_scores_in_16_bits_on_the_device_are_those_of_the_cpu(name, precision, tmp_path):
    about = fitted(tmp_path / "runs", torch.float32)
    on_device, on_cpu = (asked(*about, METHODS[name], where, tmp_path / where, precision) for where in (HERE, "cpu"))
    torch.testing.assert_close(on_device, on_cpu, rtol=0, atol=0.02 * float(on_cpu.abs().max()), equal_nan=True)


@devices.standin_only
def test_a_device_without_float64_refuses_it(tmp_path):
    about = fitted(tmp_path, torch.float32)
    with devices.without_float64(), pytest.raises(ValueError, match="got '64-true' on standin, which has no float64"):
        asked(*about, TracInCP(), HERE, tmp_path, "64-true")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", ["TracInCP", "TracIn", "HyDRA", "SOURCE", "LeaveOneOut"])
def test_a_fit_on_the_device_is_scored_there(name, optimizer, dtype, tmp_path):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"weight_decay": 0.1, "lr": 0.01}
    about = fitted(tmp_path / "runs", dtype, HERE, net=Net(optimizer=optimizer, **options))
    on_device, on_cpu = (asked(*about, METHODS[name], where, tmp_path / where) for where in (HERE, "cpu"))
    assert_same(on_device, on_cpu, dtype)


@pytest.mark.parametrize("name", TRACKED)
def test_trackers_follow_a_fit_on_the_device(name, dtype, tmp_path):
    options = {
        "methods": [TRACKED[name]],
        "queries": data(3, 2, dtype),
        "batch_size": 1 if name == "TracInIdeal" else 4,
    }
    found = []
    for where in (HERE, "cpu"):
        influence = fitted(tmp_path / where, dtype, where, **options)[2]
        (scores,) = influence.scores.values()
        found.append(scores.values)
    assert_same(*found, dtype)


@pytest.mark.parametrize("name", ["TracInCP", "EKFAC", "ExactGGN", "RepresenterPoints"])
def test_self_influence_on_the_device(name, dtype, tmp_path):
    module, train, influence = fitted(tmp_path, dtype)
    found = [
        Attributor(module, train, influence.trajectory, trainer=trainer(where)).self_influence(METHODS[name]).values
        for where in (HERE, "cpu")
    ]
    assert_same(*found, dtype)


@pytest.mark.parametrize("dtype", ["no float64"], indirect=True)  # with it, scores take the same paths
@pytest.mark.parametrize("name", METHODS)
def test_costs_are_estimated_on_the_device(name, dtype, tmp_path):
    module, train, influence = fitted(tmp_path / "runs", dtype)
    refit = Refit(dirpath=tmp_path / "refit")
    ask = Attributor(module, train, influence.trajectory, trainer=trainer(HERE), refit=refit, batch_size=5)
    assert ask.cost(METHODS[name], data(3, 2, train.tensors[0].dtype)) > 0
    assert ask.cost(METHODS[name]) > 0


@pytest.mark.parametrize("method", [InfluenceFunction(ExactGGN(damping=0.1)), TracInCP()], ids=lambda m: m.name)
def test_groups_and_the_strongest_on_the_device(method, dtype, tmp_path):
    module, train, influence = fitted(tmp_path, dtype)
    queries, groups, best = data(3, 2, dtype), [], []
    for where in (HERE, "cpu"):
        ask = Attributor(module, train, influence.trajectory, trainer=trainer(where))
        groups.append(ask.group(method, [1, 4], queries))
        best.append(ask.score(method, queries, top_k=3).proponents(3))
    assert_same(*groups, dtype)
    assert torch.equal(best[0].train_ids, best[1].train_ids)


def test_newtons_correction_on_the_device(dtype, tmp_path):
    method = InfluenceFunction(ExactGGN(damping=0.1), correction="newton")
    module, train, influence = fitted(tmp_path, dtype)
    options = {"parameters": "net.6.*", "trajectory": influence.trajectory}
    found = [
        Attributor(module, train, trainer=trainer(where), **options).score(method, data(3, 2, dtype)).values
        for where in (HERE, "cpu")
    ]
    assert_same(*found, dtype)
