"""Linear heads with an L2 penalty, minimised by Newton's method."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.numerics.head_preconditioner import Inverse, Preconditioner
from lightning_influence.numerics.heads import Link, Rows


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


# The most products with the Hessian in one Newton step.
_MOST_PRODUCTS = 1000
# After a step with more products than this, which take about as long, the approximate inverse is made anew.
_MANY_PRODUCTS = 8
# The most numbers of the expected targets that are kept from one product to the next.
_KEPT = 2**25


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

    def value_and_gradient(self, weight: Tensor) -> tuple[float, Tensor]:
        """The objective, up to a constant, and its gradient, [class, dim].

        Raises:
            ValueError: there are no training examples.
        """
        value, total, count = 0.0, torch.zeros_like(weight), 0
        for features, target in self.rows():
            z = features @ weight.T
            value += float(self.link.loss(z, target).sum())
            total.addmm_((self.link.mean(z) - target).T, features)
            count += len(features)
        if not count:
            raise ValueError("Expected at least one training example, got none. Pass a dataset that is not empty.")
        gradient = total.mul_(self.link.scale / count).add_(weight, alpha=self.weight_decay)
        return value / count + self.weight_decay / 2 * float(weight.square().sum()), gradient

    def hessian(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplication of [class, dim] by the Hessian at ``weight``."""
        kept: list[Tensor] = []

        def product(direction: Tensor) -> Tensor:
            total, count = torch.zeros_like(direction), 0
            for block, (features, _) in enumerate(self.rows()):
                if block < len(kept):
                    mean = kept[block]
                else:
                    mean = self.link.mean(features @ weight.T)
                    if len(kept) == block and (count + len(features)) * len(weight) <= _KEPT:
                        kept.append(mean)
                total.addmm_(self.link.curvature(mean, features @ direction.T).T, features)
                count += len(features)
            return total.div_(count).add_(direction, alpha=self.weight_decay)

        return product

    def fit(
        self,
        start: Tensor,
        tolerance: float = 1e-11,
        max_iterations: int = 100,
        watch: Callable[[float], Any] = lambda share: None,
    ) -> HeadFit:
        """Minimise by Newton's method with preconditioned conjugate gradients and a backtracking line search.

        Args:
            start: the first iterate, [class, dim].
            tolerance: stop when the norm of the gradient is at most this times λ times the norm of the weight; their
                ratio is the relative error of the representer decomposition.
            max_iterations: the most Newton steps to take.
            watch: called after each product and step with the share of the way that is made, in digits of the
                gradient; True: stop.
        """
        weight = start.double().clone()
        value, gradient = self.value_and_gradient(weight)
        first = norm = float(gradient.norm())
        preconditioner = Preconditioner(self.rows, self.link, self.weight_decay)
        inverse, products, iteration = None, 0, 0
        while norm > (goal := tolerance * self.weight_decay * float(weight.norm())) and iteration < max_iterations:
            if inverse is None or products > _MANY_PRODUCTS:
                inverse = preconditioner.at(weight)
            residual = max(min(0.1, math.sqrt(norm / first)) * norm, goal / 2)
            report = partial(_report, watch, first, goal)
            step, products = self._newton_step(weight, gradient, inverse, residual, report)
            trial, trial_value, trial_gradient = self._line_search(weight, value, gradient, step)
            stalled = float(trial_gradient.norm()) > 0.9 * norm and value - trial_value <= 1e-14 * abs(value)
            if stalled and products < _MOST_PRODUCTS:
                break  # only rounding errors are left
            weight, value, gradient, norm = trial, trial_value, trial_gradient, float(trial_gradient.norm())
            iteration += 1
            if report(norm):
                break
        return HeadFit(weight, norm, iteration, self.is_minimum(weight, norm))

    def is_minimum(self, weight: Tensor, gradient_norm: float) -> bool:
        """Whether a gradient of this norm leaves a relative error of at most 1e-7 in the representer decomposition."""
        return gradient_norm <= 1e-7 * self.weight_decay * float(weight.norm())

    def _newton_step(
        self, weight: Tensor, gradient: Tensor, inverse: Inverse, goal: float, report: Callable[[float], Any]
    ) -> tuple[Tensor, int]:
        """The step, by conjugate gradients until its residual's norm is ``goal``, and how many products it took."""
        hessian, products = self.hessian(weight), 0
        step, residual = torch.zeros_like(weight), -gradient
        direction = solved = inverse(residual)
        product = float((residual * solved).sum())
        while float(residual.norm()) > goal and products < _MOST_PRODUCTS:
            if products:
                solved = inverse(residual)
                before, product = product, float((residual * solved).sum())
                direction = solved + product / before * direction
            curved, products = hessian(direction), products + 1
            length = product / float((direction * curved).sum())
            step, residual = step + length * direction, residual - length * curved
            if report(float(residual.norm())):
                break  # what was found so far slopes down too
        return step, products

    def _line_search(
        self, weight: Tensor, value: float, gradient: Tensor, step: Tensor
    ) -> tuple[Tensor, float, Tensor]:
        """The weight after as much of the step as lowers the objective or halves its gradient; these two."""
        slope = float((gradient * step).sum())
        for halvings in range(40):
            length = 0.5**halvings
            trial = weight + length * step
            trial_value, trial_gradient = self.value_and_gradient(trial)
            lower = trial_value <= value + 1e-4 * length * slope + 1e-14 * abs(value)
            # Where rounding errors hide what a step gains: a convex objective falls as long as it still slopes down.
            downwards = float((trial_gradient * step).sum()) <= 0
            if lower or downwards or float(trial_gradient.norm()) <= float(gradient.norm()) / 2:
                return trial, trial_value, trial_gradient
        return weight, value, gradient


def passes(link: Link, weight_decay: float) -> float:
    """How many products with the Hessian a minimum usually takes as long as, for cost estimates.

    As counted on MNIST's pixels and similar features, weights of 1e-6 to 0.1; a squared error takes one step.
    """
    return 6 if link.kind == "identity" else 120 * max(0.5, (0.006 / weight_decay) ** 0.2)


def _report(watch: Callable[[float], Any], first: float, goal: float, now: float) -> bool:
    """Calls ``watch`` with how far the gradient's norm is from the first to the goal; whether to stop."""
    known = 0 < goal < first and now > 0
    return known and bool(watch(min(1.0, max(0.0, math.log(first / now) / math.log(first / goal)))))
