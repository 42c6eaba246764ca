"""The optimizer rule and options of each parameter in a captured step; ``add_rule`` registers your own rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.numerics.optimizers.adam import Adam
from lightning_influence.numerics.optimizers.rule import UpdateRule
from lightning_influence.numerics.optimizers.sgd import SGD

_RULES: dict[str, UpdateRule] = {"SGD": SGD(), "Adam": Adam(), "AdamW": Adam(decoupled=True)}


@dataclass(frozen=True)
class UpdateStep:
    """How one step of one optimizer updates its parameters.

    Args:
        rule: the optimizer's rule.
        options: for each parameter that was not frozen, the options of its parameter group, with the learning rate of
            this step as ``lr``.
    """

    rule: UpdateRule
    options: Mapping[str, Mapping[str, Any]]


def add_rule(kind: str, rule: UpdateRule) -> None:
    """Register the update rule of an optimizer, for the methods that replay or track training (``HyDRA``, ``TracIn``).

    Args:
        kind: the name of the optimizer's class, such as ``"Adagrad"``; replaces a rule of that name.
        rule: its ``step`` in tensor operations, from which the derivatives follow by automatic differentiation.

    Raises:
        TypeError: ``rule`` is not an instance of an ``UpdateRule``.

    Example:
        >>> class SignDescent(UpdateRule):
        ...     def step(self, at):
        ...         return at.weight - at.options["lr"] * at.gradient.sign(), {}
        >>> add_rule("SignDescent", SignDescent())
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"Expected `rule` to be an instance of a subclass of `UpdateRule`, got {rule!r}. Pass an instance, not the "
            "class."
        )
    _RULES[kind] = rule


def rule_for(kind: str) -> UpdateRule:
    """The rule registered for an optimizer's class name.

    Raises:
        ValueError: there is none.
    """
    if kind not in _RULES:
        raise ValueError(
            f"Expected an optimizer whose update rule is known ({', '.join(sorted(_RULES))}), got `{kind}`. Write a "
            "subclass of `lightning_influence.numerics.optimizers.UpdateRule` whose `step` computes the updated weight "
            f"and state by tensor operations, and call `add_rule({kind!r}, ...)`; or use `TracInCP()`, which works "
            "with any optimizer."
        )
    return _RULES[kind]


def update_step(entry: Mapping[str, Any], rates: Sequence[float]) -> UpdateStep:
    """How a captured step updated each of its optimizer's parameters.

    Args:
        entry: one entry of a trajectory's ``settings``: the optimizer's class name and parameter groups.
        rates: the learning rate of each group in this step.

    Raises:
        ValueError: the optimizer has no rule, or options that its rule does not cover.
    """
    rule, frozen = rule_for(entry["kind"]), frozenset(entry.get("frozen", ()))
    options: dict[str, Mapping[str, Any]] = {}
    for group, rate in zip(entry["groups"], rates, strict=True):
        rule.check(group)
        own = {key: value for key, value in group.items() if key != "parameters"} | {"lr": rate}
        options.update(dict.fromkeys((name for name in group["parameters"] if name not in frozen), own))
    return UpdateStep(rule, options)
