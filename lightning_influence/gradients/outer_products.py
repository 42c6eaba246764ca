"""Per-sample gradients of a weight matrix as sums of outer products, built densely only where that is cheaper."""

import builtins
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.devices import workspace
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import ROWS, TRAFFIC, WHOLE, Part, one_row_per_example
from lightning_influence.numerics.projections import KroneckerSketch, Sketch


@dataclass(frozen=True, eq=False)
class OuterProducts(Part):
    r"""Gradients of a layer: for example n, :math:`\sum_t g_{nt} a_{nt}^\top`, and :math:`\sum_t g_{nt}` for the bias.

    Args:
        source: The layer's inputs a, [example, position, in], or the tensor that ``patches`` turns into them.
        outputs: Gradients g of the per-sample loss with respect to the layer's outputs, [example, position, out].
        shape: The weight's shape.
        bias: Whether the layer has a bias (in a factored inner product it takes only one addition).
        transposed: Whether the weight is stored as [in, out] instead of [out, in].
        patches: Unfolds ``source`` into [example, position, in]; called only when the inputs are needed.
        factor: One factor per example, [example]; None for ones. Stored separately so that scaling takes no time.
    """

    source: Tensor
    outputs: Tensor
    shape: tuple[int, ...]
    bias: bool = False
    transposed: bool = False
    patches: Callable[[Tensor], Tensor] | None = None
    factor: Tensor | None = None

    @cached_property
    def inputs(self) -> Tensor:
        """[example, position, in]."""
        return self.source if self.patches is None else self.patches(self.source)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        width_out = self.outputs.shape[2]
        return self.outputs.shape[1], math.prod(self.shape) // width_out, width_out

    @property
    def elements(self) -> int:
        """The elements of the largest tensor that is made of one example for its dense gradient."""
        t, width_in, width_out = self._sizes
        return max(super().elements * (t > 1), t * (width_in + width_out))

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.outputs

    def slice(self, rows: slice) -> "OuterProducts":
        """The same for some of the examples."""
        factor = None if self.factor is None else self.factor[rows]
        return replace(self, source=self.source[rows], outputs=self.outputs[rows], factor=factor)

    def scaled(self, factor: Tensor) -> "OuterProducts":
        """Each example's gradient times its own number."""
        factor = factor.to(self.outputs)
        return replace(self, factor=factor if self.factor is None else self.factor * factor)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """[example, position, row] and [example, position, column] of the weight as it is stored."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def _strips(self) -> Iterator["OuterProducts"]:
        """The same for a few rows of the weight after another, without the bias."""
        left, right = self._sides
        for rows in left.split(max(1, workspace(left.device) // max(1, ROWS * right.shape[2])), 2):
            shape = rows.shape[2], right.shape[2]
            yield replace(self, source=right, outputs=rows, shape=shape, bias=False, transposed=False, patches=None)

    def _weight_rows(self) -> Tensor:
        """[example, in x out]: the dense gradients of the weight."""
        left, right = self._sides
        rows = torch.bmm(left.transpose(1, 2), right).flatten(1)
        return rows if self.factor is None else rows.mul_(one_row_per_example(self.factor, rows))

    @cached_property
    def _bias_rows(self) -> Tensor:
        rows = self.outputs.sum(1)
        return rows if self.factor is None else rows * self.factor[:, None]

    @cached_property
    def _query_rows(self) -> Tensor:
        """The dense gradients of a block that is multiplied with many others, built once."""
        return self._weight_rows()

    def dense(self) -> tuple[Tensor, ...]:
        """[example, *weight shape] and, with a bias, [example, out]."""
        weight = self._weight_rows().view(len(self), *self.shape)
        return (weight, self._bias_rows) if self.bias else (weight,)

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``, in the order with fewer operations."""
        if not isinstance(other, OuterProducts):
            other.accumulate_dot(self, out.T)
            return
        if self.factor is not None or other.factor is not None:
            product = out.new_zeros(out.shape)
            replace(self, factor=None).accumulate_dot(replace(other, factor=None), product)
            for factor, shape in ((self.factor, (-1, 1)), (other.factor, (1, -1))):
                if factor is not None:
                    product *= factor.view(shape).to(product)
            out += product
            return
        other = other if self.transposed == other.transposed else other._turned()
        if self.transposed != other.transposed:
            self._accumulate_rows(other, out)
        elif self.outputs.shape[1] == other.outputs.shape[1] == 1:
            self._accumulate_single(other, out)
        elif self._prefers_rows(len(self), other):
            self._accumulate_rows(other, out)
        else:
            self._accumulate_pairs(other, out)

    def _accumulate_single(self, other: "OuterProducts", out: Tensor) -> None:
        product = self.inputs[:, 0] @ other.inputs[:, 0].T
        if self.bias:
            product += 1
        out.addcmul_(product, self.outputs[:, 0] @ other.outputs[:, 0].T)

    def _prefers_rows(self, n_queries: int, other: "OuterProducts") -> bool:
        s, width_in, width_out = self._sizes
        t = other.outputs.shape[1]
        pairs = n_queries * s * t * (width_in + width_out + TRAFFIC)
        rows = width_in * width_out * (t + n_queries + TRAFFIC)
        return rows <= pairs

    def _chunks(self, elements: int) -> "Iterator[tuple[builtins.slice, OuterProducts]]":
        step = max(1, workspace(self.like.device) // max(1, elements))
        for start in range(0, len(self), step):
            rows = slice(start, min(start + step, len(self)))
            yield rows, self.slice(rows)

    def _accumulate_rows(self, other: "OuterProducts", out: Tensor) -> None:
        if math.prod(self.shape) > WHOLE:
            for mine, theirs in zip(self._strips(), other._strips(), strict=True):
                out.add_(theirs._times_rows(mine._weight_rows()))
        else:
            out.add_(other._times_rows(self._query_rows))
        if self.bias:
            out.addmm_(self._bias_rows, other._bias_rows.T)

    def _accumulate_pairs(self, other: "OuterProducts", out: Tensor) -> None:
        s, m = self.outputs.shape[1], len(self)
        inputs, outputs = self.inputs.flatten(0, 1), self.outputs.flatten(0, 1)
        for columns, part in other._chunks(m * s * other.outputs.shape[1]):
            product = inputs @ part.inputs.flatten(0, 1).T
            if self.bias:
                product += 1
            product *= outputs @ part.outputs.flatten(0, 1).T
            summed = product.view(m, s, -1).sum(1) if s > 1 else product
            out[:, columns] += summed.view(m, len(part), -1).sum(-1)

    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""
        t, width_in, width_out = self._sizes
        if len(self) == 0:
            norms = self.outputs.new_zeros(0)
        elif t == 1:
            norms = self.inputs[:, 0].square().sum(1)
            norms = (norms + 1 if self.bias else norms) * self.outputs[:, 0].square().sum(1)
        elif t * (width_in + width_out + TRAFFIC) < width_in * width_out * (1 + TRAFFIC / t):
            norms = torch.cat([part._norm2_pairs() for _, part in self._chunks(2 * t * t)])
        else:
            rows = (replace(part, factor=None)._weight_rows() for _, part in self._chunks(width_in * width_out))
            norms = torch.cat([torch.linalg.vecdot(each, each) for each in rows])
            norms = norms + self.outputs.sum(1).square().sum(1) if self.bias else norms
        return norms if self.factor is None else norms * self.factor.square()

    def _norm2_pairs(self) -> Tensor:
        product = torch.bmm(self.inputs, self.inputs.transpose(1, 2))
        if self.bias:
            product += 1
        return (product * torch.bmm(self.outputs, self.outputs.transpose(1, 2))).sum((1, 2))

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one parameter-shaped vector."""
        matrix = vectors[0].reshape(self.shape[0], -1)
        result = ((self.inputs @ (matrix if self.transposed else matrix.T)) * self.outputs).sum((1, 2))
        if self.bias:
            result = result + self.outputs.sum(1) @ vectors[1]
        return result if self.factor is None else result * self.factor

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: inner products with dense gradients, or with the inputs first, whichever is cheaper."""
        n_vectors = len(vectors[0])
        first, then = self._times_each_operations(n_vectors)
        if first <= then:
            product = replace(self, factor=None)._times_rows(vectors[0].reshape(n_vectors, -1))
        else:
            product = self._times_inputs_first(vectors[0].reshape(n_vectors, self.shape[0], -1))
        if self.bias:
            product += vectors[1] @ self.outputs.sum(1).T
        return product if self.factor is None else product.mul_(self.factor.to(product))

    def _times_each_operations(self, n_vectors: int) -> tuple[int, int]:
        """Multiply-adds per example with dense gradients, and with the inputs first."""
        t, width_in, width_out = self._sizes
        rows = width_in * width_out * (t + n_vectors + TRAFFIC)
        return rows, n_vectors * t * width_out * (width_in + TRAFFIC)

    def operations(self, n_vectors: int) -> int:
        """Multiply-adds per example of ``times_each``."""
        return min(self._times_each_operations(n_vectors))

    def _times_rows(self, vectors: Tensor) -> Tensor:
        """[vector, example] without the bias: builds dense gradients of some examples at a time.

        Vectors that exceed the cache take many examples and few rows of the weight at a time, to be read less often.
        """
        product, start = vectors.new_zeros(len(vectors), len(self)), 0
        for strip in self._strips() if vectors.numel() > workspace(vectors.device) else (self,):
            entries = math.prod(strip.shape)
            for columns, part in strip._chunks(entries):
                product[:, columns].addmm_(vectors[:, start : start + entries], part._weight_rows().T)
            start += entries
        return product

    def _times_inputs_first(self, vectors: Tensor) -> Tensor:
        """[vector, example] without bias and factor."""
        (t, width_in, width_out), n_vectors = self._sizes, len(vectors)
        matrices = (vectors.transpose(1, 2) if self.transposed else vectors).reshape(n_vectors * width_out, width_in)
        tiles = [part._times_each(matrices, n_vectors) for _, part in self._chunks(t * n_vectors * width_out)]
        return torch.cat(tiles, 1) if tiles else matrices.new_zeros(n_vectors, 0)

    def _times_each(self, matrices: Tensor, n_vectors: int) -> Tensor:
        """[vector, example] without bias and factor; multiplies ``matrices`` [vector x out, in] by the inputs first."""
        t, _, width_out = self._sizes
        carried = (self.inputs.flatten(0, 1) @ matrices.T).view(-1, n_vectors, width_out)
        product = torch.bmm(carried, self.outputs.flatten(0, 1)[:, :, None])
        return product.view(len(self), t, n_vectors).sum(1).T

    def times_own(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: the inner product of each example's gradient with its own vector, without building the former."""
        found = self.like.new_zeros(len(self))
        for rows in self.in_cache():
            part = self.slice(rows)
            left, right = part._sides
            matrices = vectors[0][rows].to(left).reshape(len(part), left.shape[2], -1)
            found[rows] = (torch.bmm(left, matrices) * right).sum((1, 2))
        if self.bias:
            found += torch.linalg.vecdot(self.outputs.sum(1), vectors[1].to(found))
        return found if self.factor is None else found * self.factor

    def weighted_norm2(self, weights: tuple[Tensor, ...]) -> Tensor:
        """[weighting, example]: sums of squared entries times weights; of one position, without building them."""
        if self.outputs.shape[1] > 1:
            return super().weighted_norm2(weights)
        left, right = self.scaled_outputs()[:, 0].square(), self.inputs[:, 0].square()
        tables = weights[0].reshape(len(weights[0]), self.shape[0], -1)
        tables = tables.transpose(1, 2) if self.transposed else tables
        found = torch.stack([((left @ table) * right).sum(1) for table in tables])
        return found + weights[1] @ left.T if self.bias else found

    def add_to(self, rows: tuple[Tensor, ...]) -> None:
        """Add the dense gradients to ``rows``, without building them first where the memory layout allows."""
        left, right = replace(self, outputs=self.scaled_outputs(), factor=None)._sides
        rows[0].view(len(self), left.shape[2], right.shape[2]).baddbmm_(left.transpose(1, 2), right)
        if self.bias:
            rows[1].add_(self._bias_rows)

    def adding_operations(self) -> int:
        """Multiply-adds per example of ``add_to``."""
        t, width_in, width_out = self._sizes
        return t * width_in * width_out

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, [*shape] for each parameter: one matrix product over all positions."""
        left, right = self.scaled_outputs().flatten(0, 1), self.inputs.flatten(0, 1)
        weight = (right.T @ left if self.transposed else left.T @ right).view(self.shape)
        return (weight, left.sum(0)) if self.bias else (weight,)

    def squares(self) -> tuple[Tensor, ...]:
        """The sum over the examples of squared entries, parameter-shaped."""
        if self.outputs.shape[1] == 1 or not len(self):
            left, right = self.scaled_outputs()[:, 0].square(), self.inputs[:, 0].square()
            weight = right.T @ left if self.transposed else left.T @ right
        else:
            weight = torch.cat([Part.squares(strip)[0] for strip in self._strips()])
        weight = weight.reshape(self.shape)
        return (weight, self._bias_rows.square().sum(0)) if self.bias else (weight,)

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others."""
        t, width_in, width_out = self._sizes
        kept = t > 1 and width_in * width_out <= WHOLE and self._prefers_rows(n_queries, self)
        written_out = width_in * width_out if kept else 0
        return (t * (width_in + width_out) + written_out) * self.outputs.element_size()

    def stored_bytes(self) -> int:
        """The bytes of the inputs before they are unfolded, and of the output gradients."""
        return (self.source.numel() + self.outputs.numel()) * self.outputs.element_size()

    def merged(self, other: Part) -> Part | None:
        """The sum of the gradients of two uses of one weight: outer products over the positions of both."""
        if isinstance(other, OuterProducts) and self.transposed != other.transposed:
            other = other._turned()
        if not isinstance(other, OuterProducts) or (self.bias, self.transposed) != (other.bias, other.transposed):
            return None
        inputs = torch.cat([self.inputs, other.inputs], 1)
        outputs = torch.cat([self.scaled_outputs(), other.scaled_outputs()], 1)
        return replace(self, source=inputs, outputs=outputs, patches=None, factor=None)

    def _turned(self) -> "OuterProducts":
        """The same, as of a weight stored the other way, such as one that is used by ``linear`` and by ``@``."""
        if self.bias:  # its gradients are of the outputs
            return self
        return replace(self, source=self.outputs, outputs=self.inputs, patches=None, transposed=not self.transposed)

    def scaled_outputs(self) -> Tensor:
        """The output gradients times each example's factor, [example, position, out]."""
        return self.outputs if self.factor is None else self.outputs * one_row_per_example(self.factor, self.outputs)

    def per_parameter(self) -> tuple[Part, ...]:
        """The weight's outer products, and the dense gradients of the bias."""
        return (replace(self, bias=False), DenseRows((self._bias_rows,))) if self.bias else (self,)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of the weight, and that of the bias if there is one."""
        return (self.shape, (self.outputs.shape[2],)) if self.bias else (self.shape,)

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """The projected gradients: outer products of projected factors, or dense rows for a plain sketch."""
        weight, sketch = replace(self, bias=False), sketches[0]
        bias = DenseRows((self._bias_rows,)).projected(sketches[1:]) if self.bias else ()
        if not isinstance(sketch, KroneckerSketch):
            chunks = [sketch.rows(part.dense()[0]) for _, part in weight._chunks(math.prod(self.shape))]
            return (DenseRows((torch.cat(chunks),)), *bias)
        sides = (sketch.on_left, sketch.on_right) if self.transposed else (sketch.on_right, sketch.on_left)
        inputs, outputs = sides[0](self.inputs), sides[1](self.outputs)
        shape = (outputs.shape[2], inputs.shape[2])
        shape = shape[::-1] if self.transposed else shape
        return (replace(weight, source=inputs, outputs=outputs, shape=shape, patches=None), *bias)

    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""
        return self.outputs.isfinite().flatten(1).all(1) & self.source.isfinite().flatten(1).all(1)
