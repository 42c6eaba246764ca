"""Data and module are compared with those of the fit at each question, not only at the first."""

import pytest
import torch
from case import Step
from fits import fit, loader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence import Attributor, Influence, TracInCP, Trajectory


class Weighted(Step):
    def __init__(self):
        super().__init__(nn.Linear(4, 1), F.mse_loss)
        self.weight = 1.0

    def training_step(self, batch, batch_idx):
        return self.weight * super().training_step(batch, batch_idx)


@pytest.fixture
def fitted(tmp_path):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randn(12, 1, generator=generator).double()
    module, train = Weighted().double(), TensorDataset(x, y)
    fit(module, loader(train), Influence(dirpath=tmp_path))
    return module, train, Trajectory.load(tmp_path / "run-0")


def weighted(module, train):
    module.weight = 5.0


def relabelled(module, train):
    train.tensors[1].mul_(-3)


@pytest.mark.parametrize(
    ("change", "text"), [(weighted, "to give the losses of the fit"), (relabelled, "to give the batches")]
)
def test_a_change_after_the_first_question_is_refused(fitted, change, text):
    module, train, trajectory = fitted
    attributor = Attributor(module, train, trajectory)
    first = attributor.score(TracInCP(), train).values
    assert torch.equal(attributor.score(TracInCP(), train).values, first)
    change(module, train)
    for ask in (attributor.score, attributor.score):
        with pytest.raises(ValueError, match=f"{text}.*check_data=False"):
            ask(TracInCP(), train)


@pytest.mark.parametrize("change", [weighted, relabelled])
def test_a_change_is_scored_where_nothing_is_to_be_compared(fitted, change):
    module, train, trajectory = fitted
    attributor = Attributor(module, train, trajectory, check_data=False)
    first = attributor.score(TracInCP(), train).values
    change(module, train)
    assert not torch.allclose(attributor.score(TracInCP(), train).values, first)


def test_a_change_that_is_taken_back_is_none(fitted):
    module, train, trajectory = fitted
    attributor = Attributor(module, train, trajectory)
    first = attributor.score(TracInCP(), train).values
    module.weight = 5.0
    with pytest.raises(ValueError, match="losses of the fit"):
        attributor.self_influence(TracInCP())
    module.weight = 1.0
    assert torch.equal(attributor.score(TracInCP(), train).values, first)
