"""How optimizers move weights, as pure functions: the step, its tangent and its adjoint, by the optimizer's name."""

from lightning_influence.numerics.optimizers.groups import UpdateStep, add_rule, moves_of, rule_for
from lightning_influence.numerics.optimizers.rule import OptimizerState, UpdateInput, UpdateRule

__all__ = ["OptimizerState", "UpdateInput", "UpdateRule", "UpdateStep", "add_rule", "moves_of", "rule_for"]
