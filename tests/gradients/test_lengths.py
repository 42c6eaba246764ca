"""Examples one behind the other in a batch: those of the self-check have one length, others have not."""

import oracles
import pytest
import torch
from case import Items, Step, drawn
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot

# 3 nodes where the self-check and the spot checks look, 2 or 4 elsewhere; 24 in every block of 8.
SIZES = (3, 2, 3, 4, 2, 4, 3, 3) + (3, 2, 4, 2, 3, 4, 3, 3) + (3, 3, 2, 4, 2, 4, 3, 3)


class Sets(nn.Module):
    """The mean over each set of nodes."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch):
        nodes, owner, count = batch
        h = torch.tanh(self.layer(nodes))
        return self.head(torch.zeros(count, 4, dtype=h.dtype).index_add(0, owner, h))


class Bag:
    """Nodes and owners that move themselves."""

    def __init__(self, nodes, owner, count):
        self.parts = nodes, owner, count

    def __iter__(self):
        return iter(self.parts)

    def to(self, *args, **kwargs):
        return self


def together(items):
    nodes = torch.cat([x for x, _ in items])
    owner = torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(items)])
    return (nodes, owner, len(items)), torch.stack([y for _, y in items])


def bagged(items):
    parts, y = together(items)
    return Bag(*parts), y


@pytest.mark.parametrize("collate", [together, bagged])
def test_lengths_that_the_self_check_did_not_meet(collate):
    g = drawn(1)
    y = torch.randint(3, (len(SIZES),), generator=g)
    data = Items([(torch.randn(n, 4, generator=g, dtype=torch.float64), y[i]) for i, n in enumerate(SIZES)])
    torch.manual_seed(0)
    module = Step(Sets()).double()
    attributor = Attributor(module, DataLoader(data, 8, collate_fn=collate), batch_size=8)
    actual = attributor.self_influence(GradientDot()).values
    ones = [collate([data[i]]) for i in range(len(data))]
    expected = oracles.rows(module, ones, [name for name, _ in module.named_parameters()])
    oracles.assert_scores(actual, oracles.squared(expected), 1e-10)
