"""Linear heads with an L2 penalty: recognising the loss on their outputs, and minimising it by Newton's method."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Iterates over the training set in blocks: features [example, dim] and targets [example, class], float64."""

# Up to this many features, a Cholesky factor of their second moment preconditions the solve.
_FACTORED = 4096


@dataclass(frozen=True)
class Link:
    r"""A loss with a canonical link: its gradient with respect to the logits z is ``scale`` × (mean(z) - target).

    Args:
        kind: ``"softmax"`` (cross-entropy), ``"sigmoid"`` (binary cross-entropy) or ``"identity"`` (squared error).
        scale: the factor in front of the loss: 1 for the cross-entropy, 2 / class for a mean of squares.
    """

    kind: str
    scale: float = 1.0

    def mean(self, z: Tensor) -> Tensor:
        """The model's expectation of the target, [example, class]: the link's inverse."""
        if self.kind == "softmax":
            return z.softmax(1)
        return z.sigmoid() if self.kind == "sigmoid" else z

    def target(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The target, recovered from the gradient of the loss with respect to the logits."""
        return self.mean(z) - gradient / self.scale

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """[example]: the loss, up to a constant that does not depend on z."""
        if self.kind == "softmax":
            value = z.logsumexp(1) - (target * z).sum(1)
        elif self.kind == "sigmoid":
            value = (F.softplus(z) - target * z).sum(1)
        else:
            value = (z - target).square().sum(1) / 2
        return self.scale * value

    def curvature(self, mean: Tensor, direction: Tensor) -> Tensor:
        """The Hessian of the loss with respect to z times a vector, [example, class], given ``mean`` of z."""
        if self.kind == "softmax":
            weighted = mean * direction
            return self.scale * (weighted - mean * weighted.sum(1, keepdim=True))
        if self.kind == "sigmoid":
            return self.scale * mean * (1 - mean) * direction
        return self.scale * direction


def recognise(z: Tensor, gradient: Tensor, moved: Tensor, moved_gradient: Tensor, tolerance: float) -> Link | None:
    """Find the loss that explains how its gradient changed between two values of the logits, or None.

    Args:
        z: logits, [example, class].
        gradient: of the loss with respect to ``z``.
        moved: other logits.
        moved_gradient: of the loss with respect to ``moved``.
        tolerance: the largest error, relative to the change of the gradient.
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
    """The result of ``PenalisedHead.fit``.

    Args:
        weight: [class, dim], float64.
        gradient_norm: norm of the gradient of the penalised mean loss at ``weight``.
        iterations: Newton steps taken.
        converged: whether the representer decomposition of the weight is exact to a relative error of 1e-7.
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
        weight_decay: λ as in ``torch.optim``, which is twice the λ of Yeh et al.
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
        """The gradient of the objective, [class, dim]."""
        total, count = torch.zeros_like(weight), 0
        for features, target in self.rows():
            total.addmm_((self.link.mean(features @ weight.T) - target).T, features)
            count += len(features)
        return total.mul_(self.link.scale / count).add_(weight, alpha=self.weight_decay)

    def curvature(self, weight: Tensor, direction: Tensor) -> Tensor:
        """The Hessian at ``weight`` times a vector, [class, dim]."""
        total, count = torch.zeros_like(weight), 0
        for features, _ in self.rows():
            mean = self.link.mean(features @ weight.T)
            total.addmm_(self.link.curvature(mean, features @ direction.T).T, features)
            count += len(features)
        return total.div_(count).add_(direction, alpha=self.weight_decay)

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Multiplication by the inverse of an approximate Hessian; the identity where there are too many features.

        The approximation is the second moment of the features, scaled by the curvature of the loss, plus the weight
        decay.

        Raises:
            ValueError: there are no training examples.
        """
        moment, count = None, 0
        for features, _ in self.rows():
            if features.shape[1] > _FACTORED:
                return lambda direction: direction
            moment = features.T @ features if moment is None else moment.addmm_(features.T, features)
            count += len(features)
        if moment is None:
            raise ValueError("Expected at least one training example, got none. Pass a dataset that is not empty.")
        most = self.link.scale * (1.0 if self.link.kind == "identity" else 0.25)
        moment.mul_(most / count).diagonal().add_(self.weight_decay)
        factor = torch.linalg.cholesky(moment)
        return lambda direction: torch.cholesky_solve(direction.T, factor).T

    def fit(self, start: Tensor, tolerance: float = 1e-11, max_iterations: int = 100) -> HeadFit:
        """Minimise by Newton's method with conjugate gradients and a backtracking line search.

        Args:
            start: the first iterate, [class, dim].
            tolerance: stop when the norm of the gradient is at most this times λ times the norm of the weight; their
                ratio is the relative error of the representer decomposition.
            max_iterations: the most Newton steps to take.
        """
        weight, precondition = start.double().clone(), self.preconditioner()
        value, gradient = self.value(weight), self.gradient(weight)
        first = norm = float(gradient.norm())
        iteration = 0
        while norm > tolerance * self.weight_decay * float(weight.norm()) and iteration < max_iterations:
            step = self._newton_step(weight, gradient, precondition, min(0.1, math.sqrt(norm / first)))
            trial, trial_value = self._line_search(weight, value, gradient, step)
            trial_gradient = self.gradient(trial)
            if float(trial_gradient.norm()) > norm / 2 and value - trial_value <= 1e-14 * abs(value):
                break  # only rounding errors are left
            weight, value, gradient, norm = trial, trial_value, trial_gradient, float(trial_gradient.norm())
            iteration += 1
        return HeadFit(weight, norm, iteration, self.is_minimum(weight, norm))

    def is_minimum(self, weight: Tensor, gradient_norm: float) -> bool:
        """Whether a gradient of this norm leaves a relative error of at most 1e-7 in the representer decomposition."""
        return gradient_norm <= 1e-7 * self.weight_decay * float(weight.norm())

    def _newton_step(
        self, weight: Tensor, gradient: Tensor, precondition: Callable[[Tensor], Tensor], tolerance: float
    ) -> Tensor:
        """Preconditioned conjugate gradients on the Hessian, from zero."""
        step, residual = torch.zeros_like(weight), -gradient
        solved = precondition(residual)
        direction, product = solved, float((residual * solved).sum())
        goal = tolerance * float(gradient.norm())
        for _ in range(max(100, 10 * weight.numel())):  # with rounding errors it takes more steps than unknowns
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
            trial_value = self.value(trial)
            if trial_value <= value + 1e-4 * length * slope + 1e-14 * abs(value):
                return trial, trial_value
        return weight, value
