"""A resumed fit goes on with what its trackers held; a killed one ends with the numbers of an undisturbed one."""

import random

import pytest
import torch
from capture.test_resume import SaveAt
from fits import Indexed, Net, by_epoch, fit, seeded
from victim import finishes, killed

from lightning_influence import Attributor, HyDRA, Influence, Trajectory
from lightning_influence.compat import MisconfigurationException

METHODS = {
    "exact": HyDRA(mode="during_fit"),
    "in files": HyDRA(mode="during_fit", memory=1),
    "fast": HyDRA(mode="during_fit", hessian=False),
}


def influence(folder, methods=METHODS, **options):
    return Influence(methods, queries=Indexed(5), dirpath=folder, max_cost=1e9, **options)


def net(**settings):
    return seeded(Net, momentum=0.9, schedule="epoch", weight_decay=0.1, **settings)


def assert_same(one, other):
    assert list(one.scores) == list(other.scores) == list(METHODS), one.scores.reasons | other.scores.reasons
    for name in METHODS:
        torch.testing.assert_close(one.scores[name].values, other.scores[name].values, rtol=1e-6, atol=1e-8)
        assert bool(one.scores[name].values.any())


@pytest.mark.parametrize("moved", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["beside", "elsewhere"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # another dirpath is another state key
def test_a_resumed_fit_ends_with_the_numbers_of_an_undisturbed_one(moved, tmp_path):
    whole, first = influence(tmp_path / "whole"), influence(tmp_path / "parts")
    second = influence(tmp_path / ("other" if moved else "parts"))
    fit(net(), by_epoch(), whole, max_epochs=4)
    fit(net(), by_epoch(), first, SaveAt(12, tmp_path / "x.ckpt", False), max_epochs=3)
    module = net()
    fit(module, by_epoch(), second, max_epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert_same(second, whole)
    offline = Attributor(module, Indexed(), second.trajectory)
    for name, method in METHODS.items():
        found = offline.score(method, Indexed(5)).values
        torch.testing.assert_close(found, whole.scores[name].values, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resume_without_what_was_held_is_refused(tmp_path):
    fit(net(), by_epoch(), Influence(dirpath=tmp_path), SaveAt(6, tmp_path / "x.ckpt"), max_epochs=2)
    with pytest.raises(
        MisconfigurationException, match=r"Expected the state of `HyDRA-.*` at step 6.*Fit from the start"
    ):
        fit(net(), by_epoch(), influence(tmp_path), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")


def scores_of(folder):
    trajectory = Trajectory.load(folder / "influence")
    attributor = Attributor(seeded(Net, momentum=0.9, schedule="epoch"), Indexed(), trajectory)
    return {name: attributor.score(method, Indexed(5)).values for name, method in METHODS.items()}


def readable(folder):
    """What a killed fit left of its trackers is whole: whatever has its name."""
    for path in folder.rglob("trackers/*/*.pt"):
        if not path.name.startswith("."):
            torch.load(path, weights_only=True)


@pytest.mark.slow
def test_kills_change_no_hypergradient(tmp_path):
    chance = random.Random(0)
    finishes(tmp_path / "whole", "tracked")
    whole = scores_of(tmp_path / "whole")
    assert all(bool(scores.any()) for scores in whole.values())
    for k, moments in enumerate([[0.4], *([chance.uniform(0, 0.5) for _ in range(4)] for _ in range(3))]):
        killed(tmp_path / str(k), moments, readable, "tracked")
        for name, scores in scores_of(tmp_path / str(k)).items():
            torch.testing.assert_close(scores, whole[name], rtol=1e-6, atol=1e-8)
