"""Blocks whose losses were found to add up are not checked again, unless weights or data are others."""

import pytest
import torch
from case import Step
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot

N, PASSES = 40, []


class Limited(Step):
    """Limits the loss of a batch, and reads it."""

    def training_step(self, batch, batch_idx):
        PASSES.append(len(batch[0]))
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        return loss.clamp(max=3.0) if loss.item() < 1e9 else loss


@pytest.fixture
def limited():
    torch.manual_seed(0)
    module = Limited(nn.Linear(5, 3)).double()
    data = TensorDataset(0.5 * torch.randn(N, 5).double(), torch.arange(N) % 3)
    queries = TensorDataset(*data[:4])
    attributor = Attributor(module, DataLoader(data, 4))
    return module, data, lambda: attributor.score(GradientDot(), DataLoader(queries, 4))


def test_a_later_question_passes_no_example_alone_again(limited):
    _, _, ask = limited
    PASSES.clear()
    first = ask()
    assert PASSES.count(1) > N
    PASSES.clear()
    assert torch.equal(torch.as_tensor(ask().values), torch.as_tensor(first.values))
    assert PASSES.count(1) < N // 4


def larger_weights(module, data):
    with torch.no_grad():
        module.net.weight.mul_(30)


def larger_numbers(module, data):
    data.tensors[0].mul_(30)


@pytest.mark.parametrize("change", [larger_weights, larger_numbers])
def test_what_has_changed_is_checked(limited, change):
    module, data, ask = limited
    ask()
    change(module, data)
    with pytest.raises(ValueError, match="examples"):
        ask()
