"""How optimizers move weights, as pure functions: the step, its tangent and its adjoint, by the optimizer's name."""

from lightning_influence.numerics.optimizers.groups import Moves, add_rule, moves_of, rule_for
from lightning_influence.numerics.optimizers.rule import Before, Rule, State

__all__ = ["Before", "Moves", "Rule", "State", "add_rule", "moves_of", "rule_for"]
