"""A method that would visit no checkpoint, so that all scores are 0, is refused."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from case import Step
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence import EKFAC, Attributor, GradientDot, InfluenceFunction, TracInCP
from lightning_influence.methods.method import Evidence


@pytest.mark.parametrize("none", [(), [], range(0), torch.zeros(0)])
@pytest.mark.parametrize("make", [TracInCP, lambda **options: InfluenceFunction(EKFAC(), **options)])
def test_no_checkpoint_is_refused(make, none):
    with pytest.raises(ValueError, match=r"Expected `checkpoints` to have an item at least.* Leave it out"):
        make(checkpoints=none)


@dataclass(frozen=True)
class Mine(GradientDot):
    checkpoints: tuple[int, ...] | None = ()
    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS


def test_no_checkpoint_is_refused_in_a_users_method():
    train = TensorDataset(torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="`checkpoints`"):
        Attributor(Step(nn.Linear(4, 3)), train).score(Mine(), train)
