"""Lightning's ``.ckpt`` files compared with the module that they are scored with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_influence.trajectory.averages import chosen
from lightning_influence.trajectory.checkpoint import Checkpoint
from lightning_influence.trajectory.lightning_files import LightningCheckpoint, read_file
from lightning_influence.trajectory.trajectory import Trajectory
from lightning_influence.types import clean

# What wrappers around the whole module put in front of every name.
_PREFIXES = ("module.", "_forward_module.")


def fitted_trajectory(trajectory: Trajectory, module: nn.Module) -> Trajectory:
    """The trajectory, its ``.ckpt`` files under the module's names and with its own values of what they leave out.

    Args:
        trajectory: captured ones are returned as they are.
        module: the LightningModule.

    Raises:
        ValueError: a parameter that trains is not in the files, or has another shape in the last checkpoint; files have
            more than the module.
    """
    if other := other_shapes(dict(module.named_parameters()), trajectory.checkpoints[-1].shapes()):
        raise other_model(trajectory.checkpoints[-1], module, other)
    files = [checkpoint for checkpoint in trajectory.checkpoints if isinstance(checkpoint, LightningCheckpoint)]
    if not files or len(files) < len(trajectory.checkpoints):
        return trajectory
    last, notes = fitted_checkpoint(files[-1], module)
    checkpoints = tuple(replace(checkpoint, prefix=last.prefix, own=last.own) for checkpoint in files)
    settings = tuple(_without_prefix(entry, last.prefix) for entry in trajectory.settings)
    return replace(trajectory, checkpoints=checkpoints, settings=settings, notes=(*trajectory.notes, *notes))


def fitted_checkpoint(checkpoint: LightningCheckpoint, module: nn.Module) -> tuple[LightningCheckpoint, list[str]]:
    """One file under the module's names, and notes; see ``fitted_trajectory``."""
    found = chosen(read_file(checkpoint.path), checkpoint.path, checkpoint.which)
    saved = {clean(name) for part in found for name in part}
    mine = {clean(name): value for name, value in module.named_parameters()}
    prefix = _prefix(saved, mine)
    saved = {name.removeprefix(prefix) for name in saved}
    notes = []
    if prefix:
        notes.append(f"The names in the files begin with {prefix!r}, which the module's do not.")
    missing = [name for name in mine if name not in saved]
    trained = [name for name in missing if mine[name].requires_grad]
    state = {clean(name) for name in module.state_dict()}
    more = sorted(saved - state - _all_names(module))
    strict = getattr(module, "strict_loading", True) is not False
    if trained or (more and strict):
        differs = [f"no {_listed(trained)}"] * bool(trained) + [f"also {_listed(more)}"] * bool(more)
        way = "; if it needs less than is in the file, set `module.strict_loading = False`"
        if trained:
            way = "; what did not train and was left out of the file, freeze with `requires_grad_(False)`"
        raise other_model(checkpoint, module, differs, way)
    if other := other_shapes(
        mine, {clean(name).removeprefix(prefix): value.shape for part in found for name, value in part.items()}
    ):
        raise other_model(checkpoint, module, other)
    own: dict[str, Tensor] = {name: mine[name] for name in missing}
    buffers = {clean(name): value for name, value in module.named_buffers()}
    own |= {name: value for name, value in buffers.items() if name in state and name not in saved}
    if missing or len(own) > len(missing):
        notes.append(f"Not in the files, so the module's own values are used: {_listed(own)}.")
    if more:
        notes.append(f"In the files, but not in the module, whose `strict_loading` is False: {_listed(more)}.")
    hook = getattr(type(module), "on_load_checkpoint", None)
    if hook is not None and hook.__module__.partition(".")[0] not in ("pytorch_lightning", "lightning"):
        notes.append("The weights were read as they are in the files: the module's `on_load_checkpoint` is not called.")
    return replace(checkpoint, prefix=prefix, own=own), notes


def _prefix(saved: set[str], mine: Mapping[str, object]) -> str:
    """What is in front of all names in the file, if the module's parameters are found only without it."""
    if any(name in saved for name in mine):
        return ""
    return next((p for p in _PREFIXES if saved and any(p + name in saved for name in mine)), "")


def _all_names(module: nn.Module) -> set[str]:
    named = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    return {clean(name) for name, _ in named}


def other_shapes(mine: Mapping[str, Tensor], saved: Mapping[str, Sequence[int]]) -> list[str]:
    """What differs between a module's parameters and the shapes of those of a checkpoint that have the same names."""
    made = {clean(name): p for name, p in mine.items() if not is_lazy(p)}
    return [
        f"`{name}` {tuple(saved[name])} (module: {tuple(made[name].shape)})"
        for name in sorted(made.keys() & saved.keys())
        if tuple(made[name].shape) != tuple(saved[name])
    ]


def other_model(checkpoint: Checkpoint, module: nn.Module, found: Sequence[str], way_out: str = "") -> ValueError:
    """The error about a checkpoint of another module, in which something else was found."""
    return ValueError(
        f"Expected checkpoints of this {type(module).__name__}, got a checkpoint in {str(checkpoint.path)!r} with "
        f"{'; '.join(found[:5])}. Pass the module that was trained, built with the same arguments{way_out}."
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def _without_prefix(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    groups = [
        group | {"parameters": [name.removeprefix(prefix) for name in group["parameters"]]} for group in entry["groups"]
    ]
    return entry | {"groups": groups}
