"""Which precision a module is scored in: the user's, unless it runs in another only; and what to say about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_influence.data.examples import Examples
from lightning_influence.gradients.low_precision import LowPrecision
from lightning_influence.module.precision import Precision, full_products, is_half, precision_of
from lightning_influence.module.snapshot import holding, restoring
from lightning_influence.module.task import Task


@dataclass(frozen=True)
class ChosenPrecision:
    """The precision in which a module is scored.

    Args:
        precision: it.
        half: whether the module's weights are of 16 bits.
        failed: what the module raised in full precision; None: it runs, or was not tried.
    """

    precision: Precision
    half: bool = False
    failed: str | None = None


def type_of_half(module: nn.Module) -> torch.dtype | None:
    """The type of a module's weights of 16 bits; None if it has none."""
    return next((p.dtype for p in module.parameters() if is_half(p)), None)


def chosen_precision(task: Task, examples: Examples, half: torch.dtype | None) -> ChosenPrecision:
    """Try full precision on one example, where another may be needed.

    Args:
        task: in the precision that the user chose.
        examples: the training data.
        half: the type of the module's own weights of 16 bits.
    """
    asked = task.precision
    others = [asked] if asked.low is not None else list(_others(task, half)) if asked.name is None else []
    if not others:
        return ChosenPrecision(asked, half is not None)
    failed = _error(task, examples, asked.full)
    if failed is None:
        return ChosenPrecision(asked, half is not None)
    for other in others:
        if _error(task, examples, other) is None:
            return ChosenPrecision(replace(other, needed=True, lowers=asked.lowers), half is not None, failed)
    return ChosenPrecision(asked, half is not None)


def _others(task: Task, half: torch.dtype | None) -> Iterator[Precision]:
    """The precisions of 16 bits in which a module was probably trained."""
    other = other_precision(task)
    if other is not None or half is not None:
        yield other or Precision("16-mixed" if half is torch.float16 else "bf16-mixed")
    if half is torch.bfloat16:
        yield Precision("bf16-true")


def other_precision(task: Task) -> Precision | None:
    """The mixed precision of the Trainer, where the user has not chosen one."""
    of_trainer = precision_of(task.trainer)
    mixed = task.precision.name is None and of_trainer in ("16-mixed", "bf16-mixed")
    return Precision(of_trainer) if mixed else None


def _error(task: Task, examples: Examples, precision: Precision) -> str | None:
    """What the module raises in a precision on the first example; None if it runs."""
    with holding([task], "precision", precision), restoring([task], "tail"), full_products():
        try:
            task.dry_run(task.to_device(examples.one(0)))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    return None


def notes_on_precision(task: Task, chosen: ChosenPrecision, measured: Sequence[LowPrecision | None]) -> list[str]:
    """Sentences on the precision of scores.

    Args:
        task: of the question, in that precision.
        chosen: it.
        measured: what the comparison of one of 16 bits found, once it was made.
    """
    precision, found = chosen.precision, next(iter(measured), None)
    notes = []
    if chosen.half and precision.name is None:
        notes.append("Weights of 16 bits were scored in float32.")
    if chosen.failed is not None:
        notes.append(
            f"The module does not run in float32 ({chosen.failed}), and was scored in `precision={precision.name!r}`: "
            "two or three digits of each gradient are right, and it is checked no more closely."
        )
    elif precision.low is not None:
        notes.append(
            f"`precision={precision.name!r}`: gradients of examples and queries were computed in it, and summed in "
            "float32. Whatever solves equations, replays steps, retrains or fits a last layer ran in float32."
        )
    other = other_precision(task)
    if other is not None:
        notes.append(_on_trainer(other, found))
    elif found is not None:
        notes.append(f"{found}.")
    if precision.follows_tf32 and task.has_coarse_products and any(p.ndim > 1 for p in task.module.parameters()):
        notes.append(
            "Products of float32 matrices were rounded to TF32 or bfloat16, as `torch.backends` says: "
            "`precision='32-true'` computes them in full."
        )
    return notes


def _on_trainer(other: Precision, found: LowPrecision | None) -> str:
    """What the Trainer's mixed precision, which was not used, would give and take."""
    text = f"The Trainer's `precision={other.name!r}` was not used. "
    if found is None:
        return f"{text}Pass `precision={other.name!r}` for gradients in it."
    return (
        f"{text}{found}; a pass of them in it took {found.ratio:.1f} times as long (on an accelerator with larger "
        f"batches, mostly less). Pass `precision={other.name!r}` for it."
    )
