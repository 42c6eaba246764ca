"""Learning rates and parameter groups of Lightning's ``.ckpt`` files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.types import MissingEvidence, clean

Rates = float | Sequence[float | Sequence[float]] | None


def given_rates(learning_rates: Rates, paths: Sequence[Path]) -> dict[Path, list[float]] | None:
    """The learning rates that were passed, for each file."""
    if learning_rates is None:
        return None
    if isinstance(learning_rates, Sequence) and len(learning_rates) != len(paths):
        raise ValueError(
            f"Expected one entry of `learning_rates` for each of {len(paths)} checkpoints, got {len(learning_rates)!r}."
        )
    rates = list(learning_rates) if isinstance(learning_rates, Sequence) else [learning_rates] * len(paths)
    return {
        path: [float(x) for x in rate] if isinstance(rate, Sequence) else [float(rate)]
        for path, rate in zip(paths, rates, strict=True)
    }


def warned_of_stored_rates() -> str:
    """Warn that stored learning rates are those of the next step; returns the warning."""
    warning = (
        "The learning rates stored in Lightning checkpoints are those of the step after the checkpoint was written;"
        " with a schedule they differ from what was applied. Pass `learning_rates=` to"
        " `Trajectory.from_checkpoints` to set them."
    )
    warnings.warn(warning, UserWarning, stacklevel=4)
    return warning


def may_differ(contents: Sequence[Mapping[str, Any]], rates: Sequence[Sequence[float]]) -> bool:
    """Whether the learning rates stored in files may be others than those that were applied: there is a schedule."""
    return any(content.get("lr_schedulers") for content in contents) or any(list(r) != list(rates[0]) for r in rates)


def groups_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers in a file."""
    states = content.get("optimizer_states") or ()
    known = [state for state in states if isinstance(state, Mapping)] if isinstance(states, Sequence) else []
    return [group for state in known for group in state.get("param_groups", ()) if isinstance(group, dict)]


def stored_rates(groups: list[dict[str, Any]], path: Path) -> list[float]:
    """The learning rates in a file.

    Raises:
        MissingEvidence: there are none, or they are no numbers.
    """
    if not groups:
        raise MissingEvidence(
            f"Expected an optimizer's state in `{path}`, got a file saved with weights only. Pass `learning_rates=`."
        )
    rates = [group.get("lr") for group in groups]
    if wrong := [rate for rate in rates if not isinstance(rate, (int, float, Tensor))]:
        raise MissingEvidence(f"Expected numbers as learning rates in `{path}`, got {wrong!r}. Pass `learning_rates=`.")
    return [float(rate) for rate in rates]  # type: ignore[arg-type]


def reconciled(rates: list[list[float]], groups: list[dict[str, Any]]) -> tuple[list[list[float]], dict[str, Any]]:
    """Learning rates and matching groups; a file rarely says which parameter was in which group."""
    if len({len(rate) for rate in rates}) > 1:
        raise ValueError(f"Expected as many learning rates at every checkpoint, got {[len(r) for r in rates]!r}.")
    named = bool(groups) and all("param_names" in group for group in groups) and len(groups) == len(rates[0])
    if not named and any(len(set(rate)) > 1 for rate in rates):
        raise MissingEvidence(
            f"Expected one learning rate for all parameters, got {rates[-1]!r}, and the files do not say which"
            " parameter was in which group. Pass `learning_rates=` with one number for each checkpoint."
        )
    described = [
        {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
        | {"parameters": [clean(name) for name in group["param_names"]] if named else []}
        for group in groups
    ] or [{"parameters": [], "dampening": 0}]
    if not named:
        rates, described = [rate[:1] for rate in rates], described[:1]
    return rates, {"optimizer": 0, "kind": "unknown", "groups": described}
