"""Which rule and settings each parameter has in a captured step, and how a third party adds a rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.numerics.optimizers.adam import Adam
from lightning_influence.numerics.optimizers.rule import UpdateRule
from lightning_influence.numerics.optimizers.sgd import SGD

_RULES: dict[str, UpdateRule] = {"SGD": SGD(), "Adam": Adam(), "AdamW": Adam(decoupled=True)}


@dataclass(frozen=True)
class UpdateStep:
    """How one step of one optimizer moves its parameters.

    Args:
        rule: the optimizer's.
        options: by name of each parameter that was not frozen, the settings of its group with the learning rate
            applied as ``lr``.
    """

    rule: UpdateRule
    options: Mapping[str, Mapping[str, Any]]


def add_rule(kind: str, rule: UpdateRule) -> None:
    """Makes an optimizer known to everything that follows training step by step.

    Args:
        kind: the name of the optimizer's class, as a fit records it.
        rule: its ``step`` in tensor operations; the derivatives follow from it.

    Example:
        >>> class SignDescent(UpdateRule):
        ...     def step(self, at):
        ...         return at.weight - at.options["lr"] * at.gradient.sign(), {}
        >>> add_rule("SignDescent", SignDescent())
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"Expected `rule` to be an instance of a Rule's subclass, got {rule!r}.")
    _RULES[kind] = rule


def rule_for(kind: str) -> UpdateRule:
    """The rule of an optimizer's class.

    Raises:
        ValueError: there is none.
    """
    if kind not in _RULES:
        raise ValueError(
            f"Expected an optimizer with a rule ({', '.join(sorted(_RULES))}), got `{kind}`. Write a subclass of "
            "`lightning_influence.numerics.optimizers.UpdateRule` whose `step` returns the weight and state after one "
            f"step in tensor operations, and call `add_rule({kind!r}, ...)`; or use `TracInCP()`, which works with any "
            "optimizer."
        )
    return _RULES[kind]


def moves_of(entry: Mapping[str, Any], rates: Sequence[float]) -> UpdateStep:
    """What a captured step did to each of its optimizer's parameters.

    Args:
        entry: of a trajectory's ``settings``: the optimizer's kind and its groups.
        rates: the learning rate applied to each group.

    Raises:
        ValueError: an optimizer without a rule, or settings beyond the rule.
    """
    rule, frozen = rule_for(entry["kind"]), frozenset(entry.get("frozen", ()))
    options: dict[str, Mapping[str, Any]] = {}
    for group, rate in zip(entry["groups"], rates, strict=True):
        rule.check(group)
        own = {key: value for key, value in group.items() if key != "parameters"} | {"lr": rate}
        options.update(dict.fromkeys((name for name in group["parameters"] if name not in frozen), own))
    return UpdateStep(rule, options)
