"""One Newton step without each example, for a model that is linear in the scored parameters."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.devices import wide
from lightning_influence.gradients import Engine, Gradients
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.outputs import OutputWatch, refuse_other_paths
from lightning_influence.numerics.dense import Factorisation


class NewtonCorrection:
    r"""Rescales gradients so that the inverse of the full curvature acts like the inverse without each example.

    With outputs :math:`z = W x`, output gradient :math:`G_i` and Hessian :math:`S_i` of the loss by the outputs, an
    example's own curvature is :math:`H_i = S_i \otimes x x^\top`, and

    .. math:: (A - H_i)^{-1} (G_i \otimes x) = A^{-1} [((I - S_i Q_i)^{-1} G_i) \otimes x]

    where A is n times the curvature with its diagonal, and :math:`Q_i` is :math:`A^{-1}` contracted with x on both
    sides, [class, class].

    Source: Sherman, Morrison and Woodbury's formula for each example; Rubinstein, Hopkins. Rescaled Influence
    Functions. 2025.

    Args:
        engine: gives the gradients of training examples.
        examples: the training set.
        factor: the factorisation of A / n, with the parameters in the order of the engine's plan.
        shift: added to every example's gradient, by parameter name; None to add nothing.

    Raises:
        ValueError: the scored parameters are not those of one linear layer before the loss.
    """

    def __init__(
        self, engine: Engine, examples: Examples, factor: Factorisation, shift: Mapping[str, Tensor] | None
    ) -> None:
        self.engine, self.examples = engine, examples
        self.n = len(examples)
        self.factor = factor
        self.shift = shift
        self._checked = False

    def corrected(self, block: Gradients, ids: range) -> Gradients:
        """The block's gradients rescaled, in the form G' ⊗ x."""
        names, part = self._layer(block)
        inputs = wide(part.inputs[:, 0])
        if part.bias:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        classes, width = part.outputs.shape[2], inputs.shape[1]
        hessians = wide(self._loss_hessians(ids, classes))
        inverse = self._inverse(part, classes, width)  # [class, in, class, in]
        blocks = torch.einsum("ni,cidj,nj->ncd", inputs, inverse, inputs)
        gradients = wide(part.outputs[:, 0])
        gradients = gradients if part.factor is None else gradients * wide(part.factor[:, None])
        if self.shift is not None:
            gradients = gradients + torch.einsum("ncd,nd->nc", hessians, inputs @ self._solved_shift(part, names).T)
        eye = torch.eye(classes).to(hessians)
        outputs = torch.linalg.solve(eye - hessians @ blocks, gradients[:, :, None])[:, :, 0]
        corrected = replace(part, outputs=outputs[:, None].to(part.outputs), factor=None)
        return Gradients({names: corrected}, block.groups, block.size)

    def _layer(self, block: Gradients) -> tuple[tuple[str, ...], OuterProducts]:
        names, part = next(iter(block.parts.items()))
        linear = (
            isinstance(part, OuterProducts)
            and part.outputs.shape[1] == 1
            and not part.transposed
            and len(part.shape) == 2
        )
        if len(block.parts) != 1 or not linear or set(names) != set(self.engine.plan.names):
            counted = ", ".join(self.engine.plan.names[:6])
            raise ValueError(
                "Expected, for `correction='newton'`, a model that is linear in the scored parameters, those of one "
                f"linear layer before the loss (weight and bias in one parameter group), got {counted}. Pass "
                "`parameters='head.*'` (the last layer's name) to the Attributor, or `correction=None`."
            )
        assert isinstance(part, OuterProducts)
        return names, part

    def _loss_hessians(self, ids: range, classes: int) -> Tensor:
        """[example, class, class]: the Hessian of each example's loss with respect to the layer's outputs."""
        block = next(self.examples.blocks(ids.start, ids.stop))
        named = self.engine.task.named_parameters()
        parameters = {name: named[name] for name in self.engine.plan.names}
        with self.engine.task.in_full(), requiring_gradients(self.engine.task.module, list(parameters)):
            watch = OutputWatch(parameters.values(), last_layer=True)
            with watch:
                total = self.engine.total(block)
            outputs = watch.outputs()
            if not self._checked:
                refuse_other_paths(total, outputs, parameters)
                self._checked = True
            (arriving,) = torch.autograd.grad(total, outputs, create_graph=True)
            sums = [arriving[:, c].sum() for c in range(classes)]
            rows = [torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in sums]
        return torch.stack(rows, 1)

    def _inverse(self, part: OuterProducts, classes: int, width: int) -> Tensor:
        """A^-1 as [class, in, class, in], with the bias as the last input."""
        inverse = self.factor.inverse / self.n
        order = torch.arange(len(inverse))
        if part.bias:  # the weight lies first, then the bias
            weight = order[: classes * (width - 1)].view(classes, width - 1)
            order = torch.cat([weight, order[classes * (width - 1) :, None]], 1).flatten()
        return inverse[order][:, order].view(classes, width, classes, width)

    def _solved_shift(self, part: OuterProducts, names: tuple[str, ...]) -> Tensor:
        """A^-1 times the shift, [class, in], with the bias as the last input."""
        assert self.shift is not None
        flat = wide(torch.cat([self.shift[name].flatten() for name in names]))
        solved = self.factor.solve(flat[None])[0] / self.n
        weight = solved[: part.shape[0] * part.shape[1]].view(part.shape[0], -1)
        return torch.cat([weight, solved[weight.numel() :, None]], 1) if part.bias else weight
