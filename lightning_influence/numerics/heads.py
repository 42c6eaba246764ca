"""Linear heads under an L2 penalty: which loss stands behind one, and its minimum by Newton's method."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Goes through the training set: features [example, dim] and targets [example, class], float64, some at a time."""

# Up to this many features their second moment is factored to precondition the solve.
_FACTORED = 4096


@dataclass(frozen=True)
class Link:
    r"""A loss whose gradient by the pre-activations z is ``scale`` × (mean(z) - target).

    Args:
        kind: ``"softmax"`` (cross-entropy), ``"sigmoid"`` (binary cross-entropy) or ``"identity"`` (squared error).
        scale: whatever multiplies it: 1 for the cross-entropy, 2 / class for a mean of squares.
    """

    kind: str
    scale: float = 1.0

    def mean(self, z: Tensor) -> Tensor:
        """What the model expects the target to be, [example, class]."""
        if self.kind == "softmax":
            return z.softmax(1)
        return z.sigmoid() if self.kind == "sigmoid" else z

    def target(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The target, given the gradient of the loss by the pre-activations."""
        return self.mean(z) - gradient / self.scale

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """[example], up to what does not depend on z."""
        if self.kind == "softmax":
            value = z.logsumexp(1) - (target * z).sum(1)
        elif self.kind == "sigmoid":
            value = (F.softplus(z) - target * z).sum(1)
        else:
            value = (z - target).square().sum(1) / 2
        return self.scale * value

    def curvature(self, mean: Tensor, direction: Tensor) -> Tensor:
        """The second derivative of the loss by z where the model expects ``mean``, times a direction."""
        if self.kind == "softmax":
            weighted = mean * direction
            return self.scale * (weighted - mean * weighted.sum(1, keepdim=True))
        if self.kind == "sigmoid":
            return self.scale * mean * (1 - mean) * direction
        return self.scale * direction


def recognise(z: Tensor, gradient: Tensor, moved: Tensor, moved_gradient: Tensor, tolerance: float) -> Link | None:
    """The loss whose gradient changes as it did between two values of the pre-activations, or None.

    Args:
        z: pre-activations, [example, class].
        gradient: of the loss by them.
        moved: others.
        moved_gradient: of the loss by those.
        tolerance: relative to the change of the gradient.
    """
    change = (moved_gradient - gradient).double()
    for kind in ("softmax", "sigmoid", "identity"):
        if kind == "softmax" and z.shape[1] == 1:
            continue
        link = Link(kind)
        expected = link.mean(moved.double()) - link.mean(z.double())
        scale = float((expected * change).sum() / expected.square().sum())
        if scale > 0 and float((change - scale * expected).norm()) <= tolerance * float(change.norm()):
            return Link(kind, scale)
    return None


@dataclass(frozen=True)
class HeadFit:
    """A head at the minimum, or as near as the solve came.

    Args:
        weight: [class, dim], float64.
        gradient_norm: of the penalised mean loss there.
        iterations: Newton steps.
        converged: whether what it leaves of the decomposition is below 1e-7 of the weight.
    """

    weight: Tensor
    gradient_norm: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class PenalisedHead:
    r"""The objective :math:`\frac1n\sum_i \ell(W f_i, y_i) + \frac{\lambda}{2}\lVert W\rVert^2`.

    Args:
        rows: the training set.
        link: the loss.
        weight_decay: λ in torch's sense, twice the λ of Yeh et al.
    """

    rows: Rows
    link: Link
    weight_decay: float

    def value(self, weight: Tensor) -> float:
        """The objective, up to a constant."""
        total, count = 0.0, 0
        for features, target in self.rows():
            total += float(self.link.loss(features @ weight.T, target).sum())
            count += len(features)
        return total / count + self.weight_decay / 2 * float(weight.square().sum())

    def gradient(self, weight: Tensor) -> Tensor:
        """[class, dim]."""
        total, count = torch.zeros_like(weight), 0
        for features, target in self.rows():
            total.addmm_((self.link.mean(features @ weight.T) - target).T, features)
            count += len(features)
        return total.mul_(self.link.scale / count).add_(weight, alpha=self.weight_decay)

    def curvature(self, weight: Tensor, direction: Tensor) -> Tensor:
        """The Hessian at ``weight`` times ``direction``, [class, dim]."""
        total, count = torch.zeros_like(weight), 0
        for features, _ in self.rows():
            mean = self.link.mean(features @ weight.T)
            total.addmm_(self.link.curvature(mean, features @ direction.T).T, features)
            count += len(features)
        return total.div_(count).add_(direction, alpha=self.weight_decay)

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Divides by the second moment of the features, weighted as the curvature of the loss is at most."""
        moment, count = None, 0
        for features, _ in self.rows():
            if features.shape[1] > _FACTORED:
                return lambda direction: direction
            moment = features.T @ features if moment is None else moment.addmm_(features.T, features)
            count += len(features)
        if moment is None:
            raise ValueError("Expected training examples, got none.")
        most = self.link.scale * (1.0 if self.link.kind == "identity" else 0.25)
        moment.mul_(most / count).diagonal().add_(self.weight_decay)
        factor = torch.linalg.cholesky(moment)
        return lambda direction: torch.cholesky_solve(direction.T, factor).T

    def fit(self, start: Tensor, tolerance: float = 1e-11, max_iterations: int = 100) -> HeadFit:
        """Newton steps by conjugate gradients, halved until the objective falls.

        Args:
            start: where to begin, [class, dim].
            tolerance: the gradient may be this times λ times the length of the weight: the relative error of the
                decomposition.
            max_iterations: Newton steps.
        """
        weight, precondition = start.double().clone(), self.preconditioner()
        value, gradient = self.value(weight), self.gradient(weight)
        first = norm = float(gradient.norm())
        iteration = 0
        while norm > tolerance * self.weight_decay * float(weight.norm()) and iteration < max_iterations:
            step = self._newton_step(weight, gradient, precondition, min(0.1, math.sqrt(norm / first)))
            trial, reached = self._line_search(weight, value, gradient, step)
            slower = self.gradient(trial)
            if float(slower.norm()) > norm / 2 and value - reached <= 1e-14 * abs(value):
                break  # rounding is all that is left
            weight, value, gradient, norm = trial, reached, slower, float(slower.norm())
            iteration += 1
        return HeadFit(weight, norm, iteration, self.is_minimum(weight, norm))

    def is_minimum(self, weight: Tensor, gradient_norm: float) -> bool:
        """Whether what the gradient leaves of the decomposition is below 1e-7 of it."""
        return gradient_norm <= 1e-7 * self.weight_decay * float(weight.norm())

    def _newton_step(
        self, weight: Tensor, gradient: Tensor, precondition: Callable[[Tensor], Tensor], tolerance: float
    ) -> Tensor:
        """Preconditioned conjugate gradients on the Hessian, from zero."""
        step, residual = torch.zeros_like(weight), -gradient
        solved = precondition(residual)
        direction, product = solved, float((residual * solved).sum())
        goal = tolerance * float(gradient.norm())
        for _ in range(max(100, 10 * weight.numel())):  # rounding makes it take more steps than there are unknowns
            curved = self.curvature(weight, direction)
            length = product / float((direction * curved).sum())
            step, residual = step + length * direction, residual - length * curved
            if float(residual.norm()) <= goal:
                break
            solved = precondition(residual)
            before, product = product, float((residual * solved).sum())
            direction = solved + product / before * direction
        return step

    def _line_search(self, weight: Tensor, value: float, gradient: Tensor, step: Tensor) -> tuple[Tensor, float]:
        slope = float((gradient * step).sum())
        for halvings in range(40):
            length = 0.5**halvings
            trial = weight + length * step
            reached = self.value(trial)
            if reached <= value + 1e-4 * length * slope + 1e-14 * abs(value):
                return trial, reached
        return weight, value
