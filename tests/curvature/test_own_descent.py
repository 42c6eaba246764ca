"""SOURCE's self-influence, which stays in the layers' eigenbases, against its scores, which are computed densely."""

import oracles
import pytest
import torch
from fits import fit
from torch.utils.data import DataLoader, Subset

from curvature.test_ekfac import NETS, problem
from lightning_influence import EKFAC, SOURCE, Attributor, Influence, Trajectory
from lightning_influence.curvature import own_descent

torch.set_num_threads(1)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.5, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}


def fitted(name, optimizer, folder, n=9):
    module, train, _ = problem(name)
    train, module.configure_optimizers = Subset(train, range(n)), lambda: OPTIMIZERS[optimizer](module.parameters())
    fit(module, DataLoader(train, 3, shuffle=True), Influence(dirpath=folder), max_epochs=3)
    return module, train, Trajectory.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "n"), [*((name, 9) for name in NETS), ("mlp", 4), ("convolutions", 2)])
def test_self_influence_is_the_diagonal_of_the_scores(tmp_path, monkeypatch, name, n, optimizer):
    module, train, trajectory = fitted(name, optimizer, tmp_path, n)
    method = SOURCE(3, EKFAC(labels="empirical", tolerance=0))
    expected = Attributor(module, train, trajectory).score(method, train).values.diagonal()
    for size in (2**29, 3000):  # a few at once
        monkeypatch.setattr("lightning_influence.curvature.curvature._BYTES", size)
        found = Attributor(module, train, trajectory, batch_size=5).self_influence(method)
        oracles.assert_scores(found.values, expected, 1e-10)


def test_layers_with_complete_bases_are_never_written_out(tmp_path, monkeypatch):
    module, train, trajectory = fitted("mlp", "sgd", tmp_path)
    monkeypatch.setattr(own_descent, "descend_layer", None)
    monkeypatch.setattr(own_descent.LayerVectors, "dense", None)
    assert Attributor(module, train, trajectory).self_influence(SOURCE(3)).values.isfinite().all()
