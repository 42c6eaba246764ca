"""Gradients by a computed weight as gradients of its parameters, kept in factors where the computation allows it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.derivations import Elementwise, Selection
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.pulled import Pulled
from lightning_influence.gradients.rules.computed import Result, Source, View, replay
from lightning_influence.gradients.rules.embedding import EMBEDDINGS, without_padding
from lightning_influence.gradients.rules.rule import Parts
from lightning_influence.gradients.sum_of_parts import SumOfParts
from lightning_influence.module.torch_functions import functions_named

Steps = list[tuple[Source, Part]] | None
"""Operands of a computation, and gradients by them; None where factors do not pass through it."""


def carried_back(source: Source, part: Part) -> Iterator[tuple[Names, Part]]:
    """Parts of the parameters from the gradients by a tensor that is computed from them; none of an empty one."""
    if not source.value.numel():
        return
    if isinstance(source, View):
        if (reshaped := _reshaped(source, part)) is not None:
            yield from carried_back(source.base, reshaped)
        elif isinstance(source.base, (View, Result)):
            yield from _replayed(source, part)
        else:
            yield source.names, _selected(part, source.selection)
    elif isinstance(source, Result):
        if (steps := _step(source, part)) is None:
            yield from _replayed(source, part)
        for operand, own in steps or ():
            yield from carried_back(operand, own)
    else:
        yield source.names, part


def _replayed(source: Source, part: Part) -> Iterator[tuple[Names, Part]]:
    derivation = replay(source)
    if isinstance(part, DenseRows):
        for name, rows in zip(source.names, derivation.back(part.rows[0]), strict=True):
            yield (name,), DenseRows((rows,))
    else:
        yield source.names, Pulled(part, derivation)


def _selected(part: Part, selection: Selection) -> Part:
    """Gradients by a selection as those of the parameter, where each term is a selection of its own if it can be."""
    if isinstance(part, SumOfParts):
        return SumOfParts(tuple(_selected(term, selection) for term in part.terms))
    if isinstance(part, Pulled) and isinstance(part.derivation, Selection) and (both := part.derivation.of(selection)):
        return Pulled(part.part, both)
    return Pulled(part, selection)


def apart(parts: Parts) -> Parts:
    """Outer products at positions of which some are padding: without their bias, and no layers of K-FAC.

    A factor of the inputs would count the padding.
    """
    found: Parts = {}
    for key, part in parts.items():
        if isinstance(part, OuterProducts):
            weight, *others = part.per_parameter()
            found[key[:1]] = Pulled(weight, Selection.whole(weight.shapes()[0]))
            found |= {(role,): other for role, other in zip(key[1:], others, strict=True)}
        else:
            found[key] = part
    return found


def _reshaped(view: View, part: Part) -> Part | None:
    """The same gradients by the tensor that a view is of, where it has all entries of it, as matrices do."""
    base, own, selected = view.base.value, view.value, view.selection
    if own.numel() != base.numel() or selected.offset or not base.is_contiguous():
        return None
    transposed = base.ndim == own.ndim == 2 and own.stride() == base.T.stride() and own.shape == base.T.shape
    if not (transposed or own.is_contiguous()):
        return None
    if isinstance(part, DenseRows):
        rows = part.rows[0].transpose(1, 2) if transposed else part.rows[0].reshape(len(part), *base.shape)
        return DenseRows((rows,))
    if not isinstance(part, OuterProducts):
        return None
    if transposed:
        return replace(part, shape=tuple(base.shape), transposed=not part.transposed)
    return replace(part, shape=tuple(base.shape)) if base.ndim and base.shape[0] == own.shape[0] else None


# ---- functions through which factors pass ------------------------------------------------------------------------


def _step(result: Result, part: Part) -> Steps:
    """The gradients by the operands of a function."""
    passes = _PASSES.get(result.func)
    if passes is None or (passes not in _OWN_ARGUMENTS and (result.kwargs or len(result.args) != 2)):
        return None
    return passes(result, part)


def _sum(result: Result, part: Part, sign: int = 1) -> Steps:
    found = []
    for operand, by in zip(result.args, (1, sign), strict=True):
        source = result.sources.get(id(operand))
        if source is None:
            continue
        if source.value.shape != result.value.shape:
            return None
        found.append((source, part if by == 1 else part.scaled(-part.like.new_ones(len(part)))))
    return found


def _product(result: Result, part: Part) -> Steps:
    """A product with a constant: a number, one per row or column, or a mask."""
    left, right = result.args
    source, other = result.sources.get(id(left)), right
    if source is None:
        source, other = result.sources.get(id(right)), left
    if source is None or id(other) in result.sources or source.value.shape != result.value.shape:
        return None
    scaled = _scaled(part, other, source.value)
    if scaled is None and type(source) is Source and isinstance(other, Tensor):
        derivation = Elementwise(other, source.value.shape)
        scaled = DenseRows(derivation.back(part.rows[0])) if isinstance(part, DenseRows) else Pulled(part, derivation)
    return None if scaled is None else [(source, scaled)]


def _quotient(result: Result, part: Part) -> Steps:
    left, right = result.args
    if id(left) not in result.sources or id(right) in result.sources:
        return None
    inverse = replace(result, args=(left, 1 / right))
    return _product(inverse, part)


def _scaled(part: Part, by: Any, weight: Tensor) -> Part | None:
    """The gradients times a number, or times one per output or input of a weight."""
    if not isinstance(by, Tensor):
        return part.scaled(part.like.new_full((len(part),), by))
    if not isinstance(part, OuterProducts) or by.ndim > weight.ndim:
        return None
    table = by.detach().to(part.like).reshape((1,) * (weight.ndim - by.ndim) + tuple(by.shape))
    rows, columns = table.shape[0] > 1, table.numel() > table.shape[0]
    if rows and columns:
        return None
    if columns and tuple(table.shape[1:]) != tuple(weight.shape[1:]):
        table = table.expand(1, *weight.shape[1:])
    numbers = table.flatten()
    if rows == part.transposed and numbers.numel() > 1:
        return replace(part, source=part.inputs * numbers, patches=None)
    return replace(part, outputs=part.outputs * numbers)


def _matrix_product(result: Result, part: Part) -> Steps:
    """B A, with gradients l r^T by it: those by B are l (A r)^T, those by A are (B^T l) r^T."""
    left, right = result.args
    if not isinstance(part, OuterProducts) or left.ndim != 2 or right.ndim != 2:
        return None
    first, then = (part.inputs, part.outputs) if part.transposed else (part.outputs, part.inputs)
    found: list[tuple[Source, Part]] = []
    if id(left) in result.sources:
        found.append((result.sources[id(left)], _with_sides(part, first, then @ right.detach().to(then).T, left.shape)))
    if id(right) in result.sources:
        found.append((result.sources[id(right)], _with_sides(part, first @ left.detach().to(first), then, right.shape)))
    return found


def _with_sides(part: OuterProducts, first: Tensor, then: Tensor, shape: torch.Size) -> OuterProducts:
    inputs, outputs = (first, then) if part.transposed else (then, first)
    return replace(part, source=inputs, outputs=outputs, shape=tuple(shape), patches=None)


def _joined(result: Result, part: Part) -> Steps:
    """Several matrices below or beside one another."""
    if not isinstance(part, OuterProducts) or part.patches is not None or result.value.ndim != 2:
        return None
    if result.kwargs.keys() - {"dim"}:
        return None
    tensors, dim = result.args[0], [*result.args[1:], result.kwargs.get("dim", 0)][0]
    first, then = (part.inputs, part.outputs) if part.transposed else (part.outputs, part.inputs)
    found: list[tuple[Source, Part]] = []
    start = 0
    for tensor in tensors:
        rows = slice(start, start + tensor.shape[dim])
        start = rows.stop
        if id(tensor) in result.sources:
            sides = (first[..., rows], then) if dim % 2 == 0 else (first, then[..., rows])
            found.append((result.sources[id(tensor)], _with_sides(part, *sides, tensor.shape)))
    return found


def _looked_up(result: Result, part: Part) -> Steps:
    """Rows of a table, of which all examples have the same."""
    operands = EMBEDDINGS[F.embedding].operands(*result.args, **result.kwargs)
    if operands is None or not isinstance(part, DenseRows) or id(operands["weight"]) not in result.sources:
        return None
    weight = operands["weight"]
    ids = without_padding(operands.input, operands.options["padding_idx"], len(weight)).detach()
    ids = ids.reshape(1, -1).expand(len(part), -1)
    rows = part.rows[0].reshape(*ids.shape, -1)
    return [(result.sources[id(weight)], Lookup(ids, rows, tuple(weight.shape)))]


_PASSES: Mapping[Any, Callable[[Result, Part], Steps]] = {
    **dict.fromkeys(functions_named("add __add__ __radd__"), _sum),
    **dict.fromkeys(functions_named("sub __sub__"), partial(_sum, sign=-1)),
    **dict.fromkeys(functions_named("mul multiply __mul__ __rmul__"), _product),
    **dict.fromkeys(functions_named("div true_divide __truediv__"), _quotient),
    **dict.fromkeys(functions_named("matmul mm __matmul__"), _matrix_product),
    torch.cat: _joined,
    torch.concat: _joined,
    F.embedding: _looked_up,
}
_OWN_ARGUMENTS = (_joined, _looked_up)
