"""Which of a module's parameters an attributor uses."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_influence.trajectory import Trajectory
from lightning_influence.types import clean


def selected_parameters(module: Any, trajectory: Trajectory | None, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the parameters whose gradients are used: those that train and match the patterns.

    Raises:
        ValueError: no parameter trains, a pattern matches none, or a parameter is complex.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    trained = None if trajectory is None else trajectory.parameter_groups
    captured = trajectory is not None and trajectory.captured  # parameters may have been unfrozen during the fit
    names = [
        clean(n)
        for n, p in module.named_parameters()
        if (captured or p.requires_grad) and (trained is None or clean(n) in trained)
    ]
    if not names:
        raise ValueError(f"Expected parameters that train, got none{_why_none(module, trained)}")
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"Expected `parameters` to match trainable parameters, got {pattern!r}, which matches none of "
                f"{', '.join(names[:10])}{' ...' if len(names) > 10 else ''}."
            )
    if patterns is not None:
        names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if complex_ := [clean(n) for n, p in module.named_parameters() if p.is_complex() and clean(n) in names]:
        raise ValueError(
            f"Expected real parameters, got complex numbers in {', '.join(f'`{n}`' for n in complex_[:5])}. Leave them "
            "out with `parameters=`, or store them as real numbers and call `torch.view_as_complex` in the module."
        )
    return names


def _why_none(module: Any, trained: Mapping[str, int] | None) -> str:
    """Why no parameter is used, and the way out."""
    if trained is not None and not trained:
        return (
            ": the run has no optimizer step. It ended before its first one, or `configure_optimizers` returned none. "
            "Train at least one step; or score without `trajectory=` what the module's weights are now."
        )
    if trained and not {clean(name) for name, _ in module.named_parameters()} & set(trained):
        shown = ", ".join(f"`{name}`" for name in list(trained)[:3]) + (" ..." if len(trained) > 3 else "")
        return (
            f" of those that the run trained ({shown}). Pass the module that was trained. If its layers are made in "
            '`setup`, call `module.setup("fit")` first.'
        )
    return ": all are frozen. Call `requires_grad_(True)` on the parameters that were trained."
