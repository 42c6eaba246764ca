"""Products of many vectors with the Hessian or the Gauss-Newton matrix (GGN) of the mean training loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.data.examples import Block, ChosenBlock, Examples
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.general import math_attention, requiring_gradients
from lightning_influence.gradients.hessian import NamedProduct, gradient_of, hessian_of
from lightning_influence.gradients.outputs import OutputWatch, refuse_other_paths
from lightning_influence.gradients.vjp import named, vectors_per_pass, vjp
from lightning_influence.module.snapshot import readings_of

Matrix = Literal["ggn", "hessian"]
_BLOCK = 256


@dataclass(frozen=True)
class Flat:
    """All parameters as one flat vector: converts [vector, entries] to [vector, *shape] by name and back.

    Args:
        shapes: of each parameter, in the order of the flat vector.
    """

    shapes: Mapping[str, torch.Size]

    def __len__(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def join(self, vectors: Mapping[str, Tensor], count: int, like: Tensor) -> Tensor:
        """[vector, entries]; an absent name is zeros."""
        return torch.cat(
            [
                vectors[name].reshape(count, -1) if name in vectors else like.new_zeros(count, shape.numel())
                for name, shape in self.shapes.items()
            ],
            1,
        )

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """[vector, *shape] by name."""
        parts = vectors.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: p.reshape(len(p), *s) for p, (name, s) in zip(parts, self.shapes.items(), strict=True)}

    def fill(self, value_of: Callable[[str], float]) -> Tensor:
        """[entries] float64: the same value for all entries of a parameter."""
        values = [torch.full((s.numel(),), value_of(name), dtype=torch.float64) for name, s in self.shapes.items()]
        return torch.cat(values)


class Products:
    """C v for C the Hessian or the Gauss-Newton matrix (GGN) of the mean training loss, at the module's weights.

    In eval mode and over the whole training set, without sampling: every call gives the same result. Where a batch's
    loss is a mean over tokens, the training loss is the mean over the tokens of all examples.

    Args:
        engine: its task and reduction define the per-sample losses.
        examples: the training set.
    """

    def __init__(self, engine: Engine, examples: Examples) -> None:
        self.engine = engine
        self.examples = examples
        unreached = set(engine.plan.unreached)
        parameters = engine.task.named_parameters()
        self.parameters = {name: parameters[name] for name in engine.plan.names if name not in unreached}
        self.flat = Flat({name: p.shape for name, p in self.parameters.items()})
        self._doubts: list[Tensor] = []  # by product: whether it is not finite where its vectors are

    @property
    def like(self) -> Tensor:
        """One of the parameters, for its dtype and device."""
        return next(iter(self.parameters.values()))

    def times(self, matrix: Matrix, vectors: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """C v for each vector v.

        Args:
            matrix: which matrix C is.
            vectors: [vector, entries] in the order of ``flat``.
            ids: use the sum of these examples' losses, times their weights, in place of the mean over all.

        Returns:
            [vector, entries].

        Whether they are finite is not waited for until ``check`` is called.

        Raises:
            ValueError: the network's output is not found (GGN), or the module cannot be differentiated twice.
        """
        total = torch.zeros_like(vectors)
        matrix_of = self._hessian if matrix == "hessian" else self._ggn
        with (
            self.engine.task.in_full(),
            requiring_gradients(self.engine.task.module, list(self.parameters)),
            math_attention(),
        ):
            for block in self._blocks(ids):
                activations = block.size * self.engine.width(self.examples)
                step = vectors_per_pass(len(self.flat), activations, vectors.device)
                try:
                    multiply = matrix_of(block, activations)
                    for start in range(0, len(vectors), step):
                        some = vectors[start : start + step]
                        total[start : start + step] += self.flat.join(multiply(self.flat.split(some)), len(some), some)
                except RuntimeError as error:
                    if "not implemented" not in str(error):
                        raise
                    raise ValueError(
                        f"Expected a module that can be differentiated twice, got {error}. Use `EKFAC()`, which takes "
                        "first derivatives only."
                    ) from error
        self._doubts.append(vectors.isfinite().all() & ~total.isfinite().all())
        return total if ids is not None else total / len(self.examples)

    def check(self) -> None:
        """Wait for the products so far.

        Raises:
            ValueError: one was not finite, though its vectors were.
        """
        doubts, self._doubts = self._doubts, []
        if not any(doubt for (doubt,) in readings_of(self.engine.task.module).read(doubts)):
            return
        wrong = [b.start + row for b in self.examples.blocks() for row in self.engine.gradients(b).not_finite()]
        where = f"for training examples {wrong[:10]}" if wrong else "in second derivatives"
        raise ValueError(
            f"Expected finite gradients, got NaN or infinity {where}. Look at their inputs and losses, or leave them "
            "out (`torch.utils.data.Subset`)."
        )

    def _blocks(self, ids: Sequence[int] | None) -> Iterator[Block]:
        if ids is None:
            yield from self.examples.blocks()
            return
        for start in range(0, len(ids), _BLOCK):
            chosen = list(ids[start : start + _BLOCK])
            yield ChosenBlock(chosen[0], len(chosen), self.examples.some(chosen), self.examples.one, chosen)

    def gradient(self, ids: Sequence[int]) -> Tensor:
        """[1, entries]: the sum of the gradients of these training examples, times their weights."""
        total = self.like.detach().new_zeros(1, len(self.flat))
        with self.engine.task.in_full(), requiring_gradients(self.engine.task.module, list(self.parameters)):
            for block in self._blocks(ids):
                found = gradient_of(self.engine.total(block), self.parameters)
                total += self.flat.join({name: g[None] for name, g in found.items()}, 1, total)
        return total

    def _hessian(self, block: Block, activations: int) -> NamedProduct:
        return hessian_of(self.engine.total(block), self.parameters, activations)

    def _ggn(self, block: Block, activations: int) -> NamedProduct:
        """J^T S J, for J the Jacobian of the network's outputs and S the Hessian of the loss with respect to them.

        J v is the derivative of the linear map u -> J^T u.
        """
        watch = OutputWatch(self.parameters.values())
        with watch:
            total = self.engine.total(block)
        outputs = dict(enumerate(watch.outputs()))
        at = self.engine.task, self.engine.task.version
        if self.engine.outputs_checked_at != at:
            refuse_other_paths(total, list(outputs.values()), self.parameters)
            self.engine.outputs_checked_at = at
        by_outputs = gradient_of(total, outputs, create_graph=True)
        weights = {i: torch.zeros_like(output, requires_grad=True) for i, output in outputs.items()}
        found = torch.autograd.grad(
            [*outputs.values()], [*self.parameters.values()], [*weights.values()], create_graph=True, allow_unused=True
        )
        by_weights = named(self.parameters, found)

        def multiply(directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
            moved = vjp(by_weights, weights, directions, activations)
            bent = vjp(by_outputs, outputs, moved, activations)
            return vjp(outputs, self.parameters, bent, activations)

        return multiply
