"""The update rules of optimizers as pure functions, with their Jacobian-vector and vector-Jacobian products."""

from lightning_influence.numerics.optimizers.groups import UpdateStep, add_rule, rule_for, update_step
from lightning_influence.numerics.optimizers.rule import OptimizerState, UpdateInput, UpdateRule

__all__ = ["OptimizerState", "UpdateInput", "UpdateRule", "UpdateStep", "add_rule", "rule_for", "update_step"]
