"""What a batch shares: positions, slices of a parameter, relative biases; by factored rules, equal to brute force."""

import oracles
import pytest
import torch
from case import Items, Step, drawn
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot

TIME, WIDTH = 5, 4


class Model(nn.Module):
    """Tokens, something added to them, classes."""

    def __init__(self, add, **parts):
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.add = add
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, ids):
        h = self.add(self, self.tokens(ids), ids)
        return self.head(torch.tanh(self.mix(h)).mean(1))


def table(rows=8, **options):
    return nn.Embedding(rows, WIDTH, **options)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def each(ids):
    return torch.arange(ids.shape[1])


def both(h, shared):
    return (h + shared) * shared


def relative(model, h, ids):
    """Attention with a bias for every distance, looked up once."""
    distance = each(ids)[:, None] - each(ids)[None, :] + TIME
    bias = model.bias(distance).permute(2, 0, 1).unsqueeze(0)
    weights = (torch.einsum("btd,bsd->bts", h, h)[:, None] + bias).softmax(-1)
    return (weights @ h[:, None]).mean(1)


def swin(model, h, ids):
    """The same with a bare table, indexed and folded."""
    distance = (each(ids)[:, None] - each(ids)[None, :] + TIME).flatten()
    bias = model.bias[distance].view(TIME, TIME, 2).permute(2, 0, 1).contiguous()
    weights = (torch.einsum("btd,bsd->bts", h, h)[:, None] + bias.unsqueeze(0)).softmax(-1)
    return (weights @ h[:, None]).mean(1)


FACTORED = {
    "positions [time, width]": lambda: Model(lambda m, h, ids: h + m.pos(each(ids)), pos=table()),
    "positions [1, time, width]": lambda: Model(lambda m, h, ids: m.pos(each(ids)[None]) + h, pos=table()),
    "positions added twice": lambda: Model(
        lambda m, h, ids: torch.add(torch.tanh(h + m.pos(each(ids))), m.pos(each(ids))), pos=table()
    ),
    "positions with padding": lambda: Model(lambda m, h, ids: h + m.pos(each(ids)), pos=table(padding_idx=2)),
    "a slice of a parameter": lambda: Model(lambda m, h, ids: h + m.pos[:, : ids.shape[1]], pos=parameter(1, 8, WIDTH)),
    "rows of a parameter": lambda: Model(lambda m, h, ids: h + m.pos[each(ids).flip(0)], pos=parameter(8, WIDTH)),
    "a relative bias": lambda: Model(relative, bias=nn.Embedding(2 * TIME, 2)),
    "a relative bias from a bare table": lambda: Model(swin, bias=parameter(2 * TIME, 2)),
    "one class an example, over time": lambda: Model(lambda m, h, ids: h + m.kind(ids[:, 0])[:, None], kind=table(9)),
    "tokens and kinds": lambda: Model(lambda m, h, ids: h + m.kind(ids % 2), kind=table(2)),
    "positions added and multiplied": lambda: Model(
        lambda m, h, ids: (h + m.pos(each(ids))) * m.pos(each(ids)), pos=table()
    ),
    "one look-up added and multiplied": lambda: Model(lambda m, h, ids: both(h, m.pos(each(ids))), pos=table()),
    "a slice added and multiplied": lambda: Model(
        lambda m, h, ids: both(h, m.pos[: ids.shape[1]]), pos=parameter(8, WIDTH)
    ),
    "a slice normalised first": lambda: Model(
        lambda m, h, ids: h + F.normalize(m.pos[: ids.shape[1]], dim=-1), pos=parameter(8, WIDTH)
    ),
}
GENERAL = {
    "rows of a parameter by example": lambda: Model(lambda m, h, ids: h + m.pos[ids], pos=parameter(9, WIDTH)),
    "a slice added in place": lambda: Model(
        lambda m, h, ids: (h * 2).add_(m.pos[: ids.shape[1]]), pos=parameter(8, WIDTH)
    ),
    # `nn.init` and `relu_(input=...)` pass what they write into by name
    "a tensor like a parameter, filled by name": lambda: Model(
        lambda m, h, ids: h + (m.pos + nn.init.constant_(torch.empty_like(m.pos), 0.3))[: ids.shape[1]],
        pos=parameter(8, WIDTH),
    ),
    "computed from a parameter, then written by name": lambda: Model(
        lambda m, h, ids: h + torch.relu_(input=m.pos * 2)[: ids.shape[1]], pos=parameter(8, WIDTH)
    ),
}


def data(n, seed):
    g = drawn(seed)
    ids, y = torch.randint(9, (n, TIME), generator=g), torch.randint(3, (n,), generator=g)
    return Items(list(zip(ids, y, strict=True)))


def note(make):
    """Scores of 7 examples in blocks of 3, 3 and 1 against brute force; what the notes say of the paths."""
    torch.manual_seed(0)
    module, train, queries = Step(make()).double(), data(7, 1), data(4, 2)
    scores = Attributor(module, DataLoader(train, 3), batch_size=3).score(GradientDot(), queries)
    names = [name for name, _ in module.named_parameters()]
    ones = [[next(iter(DataLoader([pair]))) for pair in items.items] for items in (train, queries)]
    left, right = (oracles.rows(module, one, names) for one in reversed(ones))
    oracles.assert_scores(scores.values, oracles.inner(left, right), 1e-10)
    total = sum(p.numel() for p in module.parameters())
    return next(text for text in scores.notes if "the fast way" in text), f"Gradients of all {total:,} parameters"


@pytest.mark.parametrize("name", FACTORED)
def test_what_examples_share_stays_on_the_factored_path(name):
    found, everything = note(FACTORED[name])
    assert everything in found


@pytest.mark.parametrize("name", GENERAL)
def test_what_no_rule_covers_is_right_on_the_general_path(name):
    found, everything = note(GENERAL[name])
    assert everything not in found
