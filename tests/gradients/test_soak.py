"""A short variant of ``tests/benchmarks/soak.py``: ordinary networks in float32 are not refused."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import soak

from lightning_influence.gradients.guard import Guard


@pytest.mark.slow
@pytest.mark.parametrize("name", soak.NETWORKS)
def test_an_ordinary_network_is_not_refused(name, monkeypatch):
    monkeypatch.setattr(Guard, "choose", Guard.choose)  # put back afterwards
    soak.more_checks(4)
    error, _ = soak.soaked(name, seed=0, examples=300, epochs=2)
    assert error is None
