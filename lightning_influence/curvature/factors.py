"""The Kronecker factors of one layer's Fisher, accumulated from per-sample gradients, with corrected eigenvalues."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.devices import workspace
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.pulled import Pulled
from lightning_influence.gradients.sum_of_parts import SumOfParts
from lightning_influence.numerics.kronecker import SecondMoment, bases
from lightning_influence.processes import Processes

# A wider factor is not decomposed: its layer keeps a diagonal Fisher.
WIDEST = 2**13


class LayerFactors:
    """Accumulates one layer's gradients: the second moments of both sides, then mean squares in their eigenbases.

    A gradient is taken as a matrix [out, in] with the bias as its last column. For gradients in outer products the two
    sides are the output gradients and the inputs, as in K-FAC. For dense gradients (a grouped convolution, a parameter
    without a factored rule) they are the columns and rows of the matrix. Parameters that are not matrices, embedding
    tables and layers that are too wide keep the diagonal only.

    Args:
        part: the layer's part of the first block of gradients, for its form and shapes.
        corrected: whether to measure the eigenvalues; otherwise they are products of the sides' own, as in K-FAC.
    """

    def __init__(self, part: Part, corrected: bool) -> None:
        self.corrected = corrected
        self.transposed = isinstance(part, OuterProducts) and part.transposed
        self.sides = side_widths(part)
        self.count = 0
        self.diagonal: list[Tensor] = []
        self.squares: Tensor | None = None
        self.trace = 0.0
        if self.sides is not None:
            self.output_moment, self.input_moment = (SecondMoment(width) for width in self.sides)

    def add(self, part: Part) -> None:
        """First pass: add a block to the second moments of both sides, or to the diagonal."""
        self.count += len(part)
        if self.sides is None:
            squares = part.squares()
            before = self.diagonal or [torch.zeros_like(table) for table in squares]
            self.diagonal = [a + b for a, b in zip(before, squares, strict=True)]
            return
        for piece in pieces(part):
            if isinstance(piece, OuterProducts):
                self.input_moment.add(piece.inputs.flatten(0, 1), piece.bias)
                self.output_moment.add(piece.scaled_outputs().flatten(0, 1))
            else:
                matrices = as_matrices(piece.dense(), self.transposed)
                self.input_moment.add(matrices.flatten(0, 1))
                self.output_moment.add(matrices.transpose(1, 2).flatten(0, 1))
                self.trace += float(matrices.square().sum())

    def join(self, processes: Processes) -> None:
        """After the first pass: add what the other processes collected."""
        self.diagonal = [processes.summed(table) for table in self.diagonal]
        self.trace = sum(processes.gathered(self.trace))
        if self.sides is not None and processes.count > 1:
            for moment in (self.output_moment, self.input_moment):
                blank = moment.replace_sum(processes.summed).new_empty(0)
            # Another process may be the one that computes them.
            self.values_out = self.basis_out = self.values_in = self.basis_in = blank
            self.stored_inputs: Tensor | None = None
            self.n_measured = 0

    @property
    def cost(self) -> float:
        """Of the eigenbases, up to a factor."""
        return 0.0 if self.sides is None else float(sum(side**3 for side in self.sides))

    def take_bases(self, processes: Processes, rank: int) -> None:
        """Those of the process that computed them: the same in all, where each might round them differently."""
        if self.sides is None or processes.count == 1:
            return
        for name in ("values_out", "basis_out", "values_in", "basis_in"):
            setattr(self, name, processes.from_rank(getattr(self, name), rank))

    def join_measured(self, processes: Processes) -> None:
        """After the second pass: add the squares of the other processes' examples."""
        if self.squares is not None:
            self.squares = processes.summed(self.squares)

    def measure(self, part: Part) -> None:
        """Second pass: add the squares of a block's gradients in the eigenbases."""
        if self.sides is None:
            return
        for piece in pieces(part):
            new = self._squares(piece)
            self.squares = new if self.squares is None else self.squares.add_(new)

    def _squares(self, piece: Part) -> Tensor:
        """[out, in] in the bases: the sum over the examples of squared gradients."""
        width_out, width_in = len(self.basis_out), len(self.basis_in)
        t = piece.outputs.shape[1] if isinstance(piece, OuterProducts) else width_out
        if not isinstance(piece, OuterProducts) or (t > 1 and t * (width_in + width_out) > width_out * width_in):
            self.n_measured += len(piece) * t
            return rotated(as_matrices(piece.dense(), self.transposed), self.basis_out, self.basis_in).square().sum(0)
        left, right = piece.scaled_outputs() @ self.basis_out, self._rotated_inputs(piece)
        if t == 1:
            return left[:, 0].square().T @ right[:, 0].square()
        return torch.bmm(left.transpose(1, 2), right).square().sum(0)

    def _rotated_inputs(self, piece: OuterProducts) -> Tensor:
        """Inputs in the basis, [example, position, in]; stored ones rely on the order of the first pass."""
        if self.stored_inputs is None:
            return rotated_inputs(piece.inputs, piece.bias, self.basis_in)
        count = len(piece) * piece.outputs.shape[1]
        self.n_measured += count
        rows = self.stored_inputs[self.n_measured - count : self.n_measured]
        return rows.view(len(piece), -1, rows.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by name."""
        if self.sides is None:
            return {f"diagonal{i}": table / self.count for i, table in enumerate(self.diagonal)}
        if self.squares is not None:
            eigenvalues = self.squares / self.count
        else:
            # Outer products: inputs per position, output gradients per example. Dense: both sides have the same trace.
            share = self.trace if self.trace else float(self.input_moment.count)
            eigenvalues = torch.outer(self.values_out / self.count, self.values_in / share)
        return {
            "eigenvalues": eigenvalues,
            **{"basis_out": self.basis_out, "basis_in": self.basis_in},
            **{"values_out": self.values_out, "values_in": self.values_in},
            "transposed": torch.tensor(self.transposed),
        }


def decompose(layers: Iterable[LayerFactors]) -> None:
    """Compute the eigenbases of both sides of layers, between the passes."""
    chosen = [layer for layer in layers if layer.sides is not None]
    found = bases([moment for layer in chosen for moment in (layer.output_moment, layer.input_moment)])
    for layer in chosen:
        layer.values_out, layer.basis_out, _ = next(found)
        layer.values_in, layer.basis_in, layer.stored_inputs = next(found)
        layer.n_measured = 0


def side_widths(part: Part) -> tuple[int, int] | None:
    """The widths of the two sides, (out, in including the bias); None if the layer keeps a diagonal only."""
    if isinstance(part, OuterProducts):
        out = part.outputs.shape[2]
        inner = sum(int(torch.Size(shape).numel()) for shape in part.shapes()[:1]) // out + part.bias
    elif _is_matrix(part) and len(part.shapes()[0]) >= 2:
        shape, *others = part.shapes()
        out, inner = shape[0], math.prod(shape[1:]) + len(others)
        if others and others[0] != (out,):
            return None
    else:
        return None
    if max(out, inner) > WIDEST or min(out, inner) < (1 if isinstance(part, OuterProducts) else 2):
        return None
    return out, inner


def _is_matrix(part: Part) -> bool:
    """Whether gradients are neither outer products nor of tables."""
    if isinstance(part, SumOfParts):
        return any(_is_matrix(term) for term in part.terms)
    return isinstance(part, (DenseRows, Pulled))


def pieces(part: Part) -> Iterator[Part]:
    """Slices of a part whose dense gradients and unfolded patches fit in the CPU cache."""
    size = sum(torch.Size(shape).numel() for shape in part.shapes())
    if isinstance(part, OuterProducts):
        t, out = part.outputs.shape[1:]
        if t == 1 and part.patches is None:
            yield part
            return
        size = max(size, t * (size // out + out))
    step = max(1, 2 * workspace(part.like.device) // max(1, size))
    for start in range(0, len(part), step):
        yield part.slice(slice(start, start + step))


def rotated_inputs(inputs: Tensor, bias: bool, basis: Tensor) -> Tensor:
    """Inputs, with a 1 appended for a bias, in a basis: [.., direction]."""
    return inputs @ basis[:-1] + basis[-1] if bias else inputs @ basis


def as_matrices(written: Sequence[Tensor], transposed: bool) -> Tensor:
    """Dense gradients of a weight, or a weight and its bias, as matrices [example, out, in] with the bias last."""
    weight = written[0].flatten(2)
    weight = weight.transpose(1, 2) if transposed else weight
    return weight if len(written) == 1 else torch.cat([weight, written[1][:, :, None]], 2)


def from_matrices(matrices: Tensor, shapes: Sequence[tuple[int, ...]], transposed: bool) -> tuple[Tensor, ...]:
    """The inverse of ``as_matrices``."""
    bias = len(shapes) > 1
    weight = matrices[:, :, :-1] if bias else matrices
    weight = (weight.transpose(1, 2) if transposed else weight).reshape(len(matrices), *shapes[0])
    return (weight, matrices[:, :, -1]) if bias else (weight,)


def rotated(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L^T M R for matrices M [example, m, n] and bases L [m, k] and R [n, l]: [example, k, l]."""
    return left.T @ (matrices @ right)


def part_of(gradients: Gradients, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> Part | None:
    """The part of these parameters: dense if the block groups them differently, None if it has none of them."""
    if names in gradients.parts:
        return gradients.parts[names]
    present = {key: part for key, part in gradients.parts.items() if set(key) & set(names)}
    rows = rows_of(names, Gradients(present, {}, gradients.size).dense(), shapes)
    return DenseRows(rows) if rows else None


def with_parts(
    factors: Mapping[Names, LayerFactors], gradients: Gradients, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[LayerFactors, Part]]:
    """Each layer with its part of a block of gradients, if it has one."""
    for names, layer in factors.items():
        if (part := part_of(gradients, names, shapes)) is not None:
            yield layer, part


def add_block(
    factors: dict[Names, LayerFactors], gradients: Gradients, shapes: Mapping[str, tuple[int, ...]], corrected: bool
) -> None:
    """First pass: add a block to the layers' moments, with new layers for parameters that none has yet."""
    covered = {name for names in factors for name in names}
    for names, part in gradients.parts.items():
        for own, one in _layers(names, part):
            if not covered & set(own):
                factors[own] = LayerFactors(one, corrected)
                covered |= set(own)
    for layer, part in with_parts(factors, gradients, shapes):
        layer.add(part)


def _layers(names: Names, part: Part) -> Iterator[tuple[Names, Part]]:
    """A weight and its bias are one layer, the parameters that a weight is computed from are one each."""
    if isinstance(part, (Pulled, SumOfParts)) and len(names) > 1:
        yield from zip(((name,) for name in names), part.per_parameter(), strict=True)
    else:
        yield names, part


def rows_of(names: Names, vectors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Vectors [vector, *shape] of these parameters, zeros for absent names; () if all are absent."""
    like = next((vectors[name] for name in names if name in vectors), None)
    if like is None:
        return ()
    return tuple(vectors[n] if n in vectors else like.new_zeros(len(like), *shapes[n]) for n in names)
