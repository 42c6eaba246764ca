"""The gradient engine: per-sample gradients in factored form, from one batched backward pass of an unchanged module."""

from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.engine import Engine, Plan
from lightning_influence.gradients.reduction import Reduction, probe
from lightning_influence.gradients.self_check import make_plan

__all__ = ["Engine", "Gradients", "Plan", "Reduction", "make_plan", "probe"]
