"""Gradients of the same examples, added up at one set of weights after another, against their rows written out."""

import pytest
import torch

from gradients.test_parts import IN, KINDS, OUT, normal, part, written_out
from lightning_influence.gradients import lookup
from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.queries import DenseQueries
from lightning_influence.gradients.running_sum import RunningSum, SumCosts

N = 6


def summed(parts, names):
    total = RunningSum()
    for each in parts:
        total.add(Gradients({names: each}, {names: 1}, N))
    return total.result()


def names_of(made):
    return tuple("ab"[: len(made.shapes())])


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize(
    "kinds", [(kind,) * 5 for kind in KINDS] + [("outer with bias", "two rows", "outer with bias")]
)
def test_sums_of_any_form_and_their_products_are_those_of_rows(kinds, positions):
    draw = torch.Generator().manual_seed(0)
    parts = [part(kind, N, positions, draw) for kind in kinds]
    found, rows = summed(parts, names_of(parts[0])), sum(written_out(each) for each in parts)
    made = found.parts[names_of(parts[0])]
    torch.testing.assert_close(written_out(made), rows)
    vectors = {name: normal(draw, 4, *shape) for name, shape in zip(names_of(made), made.shapes(), strict=True)}
    flat = torch.cat([v.reshape(4, -1) for v in vectors.values()], 1)
    torch.testing.assert_close(DenseQueries(vectors, {}).dot(found), flat @ rows.T)
    assert len(found) == N
    assert list(found.groups.values()) == [1]


@pytest.mark.parametrize("least", [1, 1000])
def test_look_ups_are_multiplied_by_id_and_one_by_one(monkeypatch, least):
    monkeypatch.setattr(lookup, "_pairs_for_a_product", lambda device: least)
    draw = torch.Generator().manual_seed(0)
    made, tables = part("lookup", N, 9, draw), normal(draw, 5, OUT, IN)
    torch.testing.assert_close(made.times_each((tables,)), tables.flatten(1) @ written_out(made).T)


def test_parameters_may_be_joined_apart_or_absent():
    draw = torch.Generator().manual_seed(0)
    joint = [part("outer with bias", N, 1, draw) for _ in range(3)]
    apart = part("outer", N, 1, draw)
    blocks = [
        {("a", "b"): joint[0]},
        {("a",): apart},
        {("a", "b"): joint[1]},
        {},
        {("c",): part("rows", N, 1, draw), ("a", "b"): joint[2]},
    ]
    total = RunningSum()
    for parts in blocks:
        total.add(Gradients(parts, {}, N))
    found = total.result().dense()
    torch.testing.assert_close(found["a"], sum(each.dense()[0] for each in (*joint, apart)))
    torch.testing.assert_close(found["b"], sum(each.dense()[1] for each in joint))
    torch.testing.assert_close(found["c"], blocks[-1]["c",].dense()[0])


@pytest.mark.parametrize(("width", "positions"), [(40, 1), (40, 3), (3, 9)])
def test_memory_does_not_grow_with_the_number_of_weights(width, positions):
    draw, total = torch.Generator().manual_seed(0), RunningSum()
    made = [
        OuterProducts(normal(draw, N, positions, width), normal(draw, N, positions, width), (width, width), True)
        for _ in range(60)
    ]
    most, row = 0, (width + 1) * width * 8
    for each in made:
        total.add(Gradients({("a", "b"): each}, {}, N))
        kept = total._parts["a", "b"]
        waiting = sum(p.stored_bytes() for p in kept.waiting)
        most = max(most, waiting + sum(r.numel() * 8 for r in kept.rows))
    assert most <= 2 * row * N
    assert most <= SumCosts.of(Gradients({("a", "b"): made[0]}, {}, N), 60, 1).bytes * N
    expected = sum(written_out(each) for each in made)
    torch.testing.assert_close(written_out(total.result().parts["a", "b"]), expected)


def test_what_the_module_writes_over_later_was_copied():
    draw, total = torch.Generator().manual_seed(0), RunningSum()
    buffer, rows = torch.empty(N, 1, 40, dtype=torch.float64), 0
    for _ in range(3):
        buffer.copy_(normal(draw, N, 1, 40))
        made = OuterProducts(buffer, normal(draw, N, 1, 40), (40, 40))
        rows = rows + written_out(made).clone()
        total.add(Gradients({("a",): made}, {}, N))
    torch.testing.assert_close(written_out(total.result().parts["a",]), rows)
