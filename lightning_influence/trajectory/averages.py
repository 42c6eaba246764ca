"""Raw and averaged weights in the content of a Lightning ``.ckpt`` file."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.trajectory.unpickling import Placeholder
from lightning_influence.types import MissingEvidence

Which = Literal["raw", "averaged", "saved"]
"""Raw weights, on which the steps were made; an average over steps; or what ``load_from_checkpoint`` gives."""

# Names under which callbacks of other packages keep an average in their state.
_AVERAGE = re.compile(r"ema|swa|averag|shadow|polyak", re.IGNORECASE)
_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")
_TENSORS_LOST = (
    "Save it as plain tensors: load it in Python where its classes are known, and write"
    " `torch.save({key: checkpoint[key] for key in ('state_dict', 'global_step', 'epoch')}, path)`."
)


@dataclass(frozen=True)
class Average:
    """Averaged weights in a file.

    Args:
        source: where they were found.
        weights: parameters, and buffers where the average has its own; None: they were not begun yet.
        buffers: those to be used with them.
        alone: the raw weights are not in the file, which was saved after the fit had put the average in their place.
        trusted: their BatchNorm statistics belong to them.
    """

    source: str
    weights: dict[str, Tensor] | None
    buffers: dict[str, Tensor]
    alone: bool = False
    trusted: bool = True


def average_in(content: Mapping[str, Any], path: Path) -> Average | None:
    """The averaged weights in a file, if it has any.

    Raises:
        MissingEvidence: several callbacks keep an average.
    """
    saved = tensors_of(content["state_dict"], path)
    if isinstance(current := content.get("current_model_state"), Mapping):
        raw = tensors_of(current, path)
        count = _count(content.get("averaging_state"))
        alone = count > 1 and all(torch.equal(raw[name], saved[name]) for name in raw.keys() & saved.keys())
        return Average("Lightning's `WeightAveraging`", saved if count else None, saved, alone)
    found = list(_kept_by_callbacks(content.get("callbacks"), saved))
    if len(found) > 1:
        raise MissingEvidence(
            f"Expected one average of the weights in `{path}`, got {', '.join(name for name, *_ in found)}. "
            f"To choose, {by_hand('one of them')}"
        )
    if not found:
        return None
    name, state, own = found[0]
    average = tensors_of(own, path)
    if "average_model_state" not in state:
        return Average(name, {**saved, **average}, {**saved, **average})
    # Lightning averages the parameters only, and computes BatchNorm's statistics in one more epoch after the fit.
    normed = any(key.endswith(_BATCH_NORM) for key in saved)
    floats = [k for k in saved.keys() & average.keys() if saved[k].is_floating_point() and not k.endswith(_BATCH_NORM)]
    count = _count(state)
    alone = count > 0 and (all(torch.equal(saved[k], average[k]) for k in floats) or _normed_again(content, saved))
    return Average(name, (saved if alone else average) if count else None, saved, alone, alone or not normed)


def by_hand(what: str) -> str:
    """How to pass averaged weights that are kept elsewhere."""
    return (
        f"write {what} to a file of its own, `torch.save({{'state_dict': averaged, 'global_step': step, 'epoch': "
        "epoch}, path)`, and pass that."
    )


def chosen(content: Mapping[str, Any], path: Path, which: Which) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers of the weights that were asked for.

    Raises:
        MissingEvidence: the file does not have them.
    """
    saved = tensors_of(content["state_dict"], path)
    if which == "saved":
        return saved, saved
    if which == "raw":
        raw = content.get("current_model_state")
        raw = tensors_of(raw, path) if isinstance(raw, Mapping) else saved
        return raw, raw
    average = average_in(content, path)
    if average is None:
        raise MissingEvidence(
            f"Expected averaged weights in `{path}`, got none that this version knows: neither Lightning's "
            "`WeightAveraging`, `EMAWeightAveraging` nor `StochasticWeightAveraging` wrote them. Pass `weights='raw'`. "
            f"For an average that another callback keeps: {by_hand('it')}"
        )
    if average.weights is None:
        raise MissingEvidence(
            f"Expected averaged weights in `{path}`, got a file from before {average.source} began to average. Leave it"
            " out, or pass `weights='raw'`."
        )
    if not average.trusted:
        raise MissingEvidence(
            f"Expected BatchNorm statistics of the averaged weights in `{path}`, got those of the raw weights:"
            " Lightning computes them after the last epoch. Pass what `trainer.save_checkpoint` writes after the fit."
        )
    return average.weights, average.buffers


def tensors_of(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a ``state_dict``.

    Raises:
        MissingEvidence: it is no dict, or has tensors of classes that are not rebuilt.
    """
    if not isinstance(state, Mapping):
        raise MissingEvidence(f"Expected a dict of tensors in `{path}`, got {state!r}. {_TENSORS_LOST}")
    for name, value in state.items():
        if isinstance(value, Placeholder) and not str(name).endswith("_extra_state"):
            raise MissingEvidence(
                f"Expected tensors in `{path}`, got `{name}` of class `{value.name}`. {_TENSORS_LOST}"
            )
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _normed_again(content: Mapping[str, Any], saved: Mapping[str, Tensor]) -> bool:
    """Whether BatchNorm's statistics were reset and computed again in an epoch after the last that trained.

    Lightning ends that epoch with one more step along the last gradient, so that the weights are not quite the average.
    """
    counters = [int(value.max()) for name, value in saved.items() if name.endswith("num_batches_tracked")]
    try:
        batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        last, total = batches["current"]["ready"], batches["total"]["ready"]
    except (KeyError, TypeError):
        return False
    return bool(counters) and max(counters) == last < total


def _kept_by_callbacks(
    states: object, saved: Mapping[str, Tensor]
) -> Iterator[tuple[str, Mapping[Any, Any], Mapping[Any, Any]]]:
    """Name, state and averaged weights of callbacks that keep an average in their state."""
    for key, state in states.items() if isinstance(states, Mapping) else ():
        owner = key.name.rsplit(".", 1)[-1] if isinstance(key, Placeholder) else str(key).partition("{")[0]
        for entry, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, Mapping) and _AVERAGE.search(f"{owner} {entry}") and _same_layout(value, saved):
                yield f"`callbacks[{owner!r}][{entry!r}]`", state, value


def _same_layout(state: Mapping[Any, Any], saved: Mapping[str, Tensor]) -> bool:
    """Whether names and shapes are those of the weights, but for integers and BatchNorm's statistics."""
    fits = [name in saved and isinstance(t, Tensor) and t.shape == saved[name].shape for name, t in state.items()]
    weights = [name for name, t in saved.items() if t.is_floating_point() and not name.endswith(_BATCH_NORM)]
    return bool(fits) and all(fits) and all(name in state for name in weights)


def _count(state: Any) -> int:
    """How many weights were averaged so far."""
    value = state.get("n_averaged", 1) if isinstance(state, Mapping) else 1
    return int(value) if isinstance(value, (int, Tensor)) else 1
