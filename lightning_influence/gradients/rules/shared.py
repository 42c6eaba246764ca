"""Tensors that all examples of a batch share in a sum: position embeddings, slices of a parameter, relative biases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.rules.elementwise import sum_broadcast
from lightning_influence.gradients.rules.embedding import EMBEDDINGS, without_padding
from lightning_influence.gradients.rules.rule import Operands, Parts

VIEWS = frozenset(
    {
        torch.Tensor.__getitem__,
        torch.Tensor.view,
        torch.Tensor.reshape,
        torch.Tensor.permute,
        torch.Tensor.transpose,
        torch.Tensor.unsqueeze,
        torch.Tensor.contiguous,
        torch.permute,
        torch.transpose,
        torch.unsqueeze,
        torch.reshape,
    }
)
"""Views, by which a shared operand may be made from a parameter."""


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor that is computed from one parameter alone, by a look-up and views.

    Args:
        name: the parameter's name.
        parameter: the parameter.
        value: the tensor.
        make: computes the tensor from the parameter.
        looked_up: whether it involves a look-up, which the rule for embeddings has recorded already.
        ids: for a look-up without views, the rows that were looked up (-1 for padding).
    """

    name: str
    parameter: Tensor
    value: Tensor
    make: Callable[[Tensor], Tensor]
    looked_up: bool
    ids: Tensor | None = None

    def is_shared_in(self, shape: Sequence[int]) -> bool:
        """Whether all examples share this tensor in a sum of that shape.

        A look-up with ids of each example's own is left to the rule for embeddings.
        """
        aligned = (1,) * (len(shape) - self.value.ndim) + tuple(self.value.shape)
        return not self.looked_up or (aligned[0] == 1 and shape[0] > 1)


def shared_tensor(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    known: Mapping[int, Shared],
    names: Mapping[int, str],
) -> Shared | None:
    """Describe ``output`` if the call made it from one parameter alone, by a look-up or a view; else None."""
    if not isinstance(output, Tensor):
        return None
    if func is F.embedding:
        return _looked_up(output, names, args, kwargs)
    if func not in VIEWS or output is args[0]:
        return None
    rest = tuple(args[1:])

    def view(tensor: Tensor) -> Tensor:
        return func(tensor, *rest, **kwargs)  # type: ignore[no-any-return]

    if id(args[0]) in names:
        return Shared(names[id(args[0])], args[0], output, view, False)
    before = known.get(id(args[0]))
    if before is None:
        return None
    return Shared(before.name, before.parameter, output, lambda p: view(before.make(p)), before.looked_up)


def _looked_up(
    output: Tensor, names: Mapping[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Shared | None:
    operands = EMBEDDINGS[F.embedding].operands(*args, **kwargs)
    if operands is None or id(operands["weight"]) not in names:
        return None
    input, weight, padding_idx = operands.input, operands["weight"], operands.options["padding_idx"]
    ids = without_padding(input, padding_idx, len(weight)).detach()
    return Shared(names[id(weight)], weight, output, lambda p: F.embedding(input, p, padding_idx), True, ids)


class SharedSum:
    """The rule for a shared operand of a sum: each example's gradient is carried back through ``Shared.make``."""

    def operands(self, shared: Shared, output: Tensor) -> Operands:
        """The operands of the sum ``output``."""
        return Operands({"shared": shared.parameter}, output, output.ndim, {"shared": shared})

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        """Dense gradients of the parameter; for a look-up without views, those of the rows that were looked up."""
        shared: Shared = operands.options["shared"]
        parameter = operands["shared"]
        rows = sum_broadcast(gradient, tuple(shared.value.shape), split)
        if shared.ids is not None:
            ids = shared.ids.reshape(1, -1).expand(len(rows), -1)
            return {("shared",): Lookup(ids, rows.reshape(*ids.shape, -1), tuple(parameter.shape))}
        with torch.enable_grad():
            given = parameter.detach().requires_grad_()
            value = shared.make(given)
        (found,) = torch.autograd.grad(value, given, rows, is_grads_batched=True)
        return {("shared",): DenseRows((found,))}


SHARED_SUM = SharedSum()
