"""Prepared curvatures on disk beside the trajectory: written atomically, reused only for the same weights and data."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.devices import has_float64, on_device, on_host, read_numbers
from lightning_influence.files.regular import check_regular
from lightning_influence.module.random_state import seed_for
from lightning_influence.setting.setting import Setting, Stage, cached
from lightning_influence.timing import Work, seconds_of
from lightning_influence.trajectory.files import write_atomically

_FORMAT = 1
_MAGIC = b"lightning_influence curvature\n"
# Examples whose losses identify the loss and the dataset.
_COMPARED = 8


def prepared_at(curvature: Curvature, setting: Setting, stage: Stage) -> PreparedCurvature:
    """The prepared curvature at a checkpoint: from memory, from disk, or computed and stored in both.

    Its notes are added to those of the scores. If the trajectory is on disk, memory holds that of the latest
    checkpoint only.
    """
    folder = None if setting.trajectory is None else setting.trajectory.path
    kept: dict[int | None, PreparedCurvature] = setting.state(curvature, dict)  # by position of the checkpoint
    if folder is not None and stage.position not in kept:
        kept.clear()
    prepared = cached(kept, stage.position, lambda: _read_or_prepare(curvature, setting, stage, folder))
    for note in prepared.notes:
        setting.note(note)
    return prepared


def _read_or_prepare(curvature: Curvature, setting: Setting, stage: Stage, folder: Path | None) -> PreparedCurvature:
    stage.check_loaded()
    if folder is None:
        return curvature.prepare(setting)
    processes = setting.processes
    about = processes.gathered(_description(curvature, setting, stage))[0]
    path, stored = _file(curvature, folder, about), None
    if path.is_file():
        try:
            stored = read(path, about, setting.zeros().device)
        except (ValueError, OSError) as error:
            setting.note(f"A stored curvature was computed again: {error}")
    everywhere = all(processes.gathered(stored is not None))
    if stored is not None and everywhere:
        return stored
    prepared = curvature.prepare(setting)
    if processes.rank > 0:
        return prepared
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, about, prepared)
    except OSError as error:
        setting.note(f"The curvature could not be stored on disk ({error}): later scores compute it again.")
    return prepared


def is_stored(curvature: Curvature, setting: Setting, stage: Stage) -> bool:
    """Whether the curvature at a checkpoint, whose weights are loaded, is on disk, so that it need not be computed."""
    folder = None if setting.trajectory is None else setting.trajectory.path
    if folder is None or next((folder / "curvature").glob(f"{type(curvature).__name__}-*"), None) is None:
        return False
    stage.check_loaded()
    return _file(curvature, folder, _description(curvature, setting, stage)).is_file()


def _file(curvature: Curvature, folder: Path, about: dict[str, Any]) -> Path:
    """Where a curvature is stored in a run's folder, by what it depends on."""
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "curvature" / f"{type(curvature).__name__}-{name}"


def preparing(curvature: Curvature, setting: Setting, stages: Iterable[Stage]) -> list[Work]:
    """What ``prepared_at`` takes at some checkpoints: stored curvatures are read, the others computed."""
    known, reading = [], 0.0
    for stage in stages:
        known.append(is_stored(curvature, setting, stage))
        if sum(known) == 1 and known[-1]:
            reading = seconds_of(lambda here=stage: prepared_at(curvature, setting, here))  # type: ignore[misc]
    computed = 0.0 if all(known) else curvature.seconds_of_preparing(setting)
    return [
        Work("reading stored curvatures", sum(known), reading),
        Work(f"preparing {type(curvature).__name__}", known.count(False), computed),
    ]


def write(path: Path, about: dict[str, Any], prepared: PreparedCurvature) -> None:
    """Write a prepared curvature atomically to one file with a checksum."""
    content = io.BytesIO()
    on_cpu = on_host([*prepared.tensors.values()])
    tensors = {name: tensor.contiguous() for name, tensor in zip(prepared.tensors, on_cpu, strict=True)}
    head = {"format": _FORMAT, "about": about, "figures": dict(prepared.diagnostics), "notes": list(prepared.notes)}
    torch.save({"head": json.dumps(head), "tensors": tensors}, content)
    body = content.getvalue()
    write_atomically(path, _MAGIC + zlib.crc32(body).to_bytes(4, "big") + body)


def read(path: Path, about: dict[str, Any], device: torch.device) -> PreparedCurvature:
    """Read a file of ``write``.

    Raises:
        ValueError: the file is damaged, has another format, or is of other weights, data or fields of the curvature.
    """
    head, tensors = read_any(path, device)
    if head["format"] != _FORMAT or head["about"] != json.loads(json.dumps(about)):
        other = sorted(k for k in about if head["about"].get(k) != json.loads(json.dumps(about[k])))
        raise ValueError(
            f"Expected the curvature for these scores in `{path.name}`, got one with different "
            f"{', '.join(other) or 'format'}."
        )
    return PreparedCurvature(tensors, head["figures"], tuple(head["notes"]))


def read_any(path: Path, device: torch.device | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors in a file of ``write``, of whatever curvature.

    Raises:
        OSError: it is missing, or no file.
        ValueError: the file is damaged.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(len(_MAGIC))
        content += file.read() if content == _MAGIC else b""  # it may be anything
    start = len(_MAGIC) + 4
    checksum = int.from_bytes(content[len(_MAGIC) : start], "big")
    if not content.startswith(_MAGIC) or zlib.crc32(content[start:]) != checksum:
        raise ValueError(f"Expected a complete curvature in `{path}`, got a damaged file.")
    # To the CPU first: a file may name a device that is not there.
    stored = torch.load(io.BytesIO(content[start:]), map_location="cpu", weights_only=True)
    tensors: dict[str, torch.Tensor] = stored["tensors"]
    if device is not None:  # where `prepare` would have made them: flags on the CPU, and float64 where there is none
        narrow = not has_float64(device)
        here = [
            n for n, t in tensors.items() if t.dtype is not torch.bool and not (narrow and t.dtype == torch.float64)
        ]
        tensors |= zip(here, on_device([tensors[name] for name in here], device), strict=True)
    return json.loads(stored["head"]), tensors


def _description(curvature: Curvature, setting: Setting, stage: Stage) -> dict[str, Any]:
    """Everything that the prepared tensors depend on."""
    assert setting.trajectory is not None
    assert stage.position is not None
    checkpoint = setting.trajectory.checkpoints[stage.position]
    plan, task = setting.engine.plan, setting.engine.task
    parameters = task.named_parameters()
    return {
        "curvature": type(curvature).__name__,
        "settings": curvature.preparation(),
        "step": checkpoint.step,
        "weights": checkpoint.crc32,
        "parameters": [[name, list(parameters[name].shape)] for name in plan.names],  # vectors are in this order
        "dtype": str(setting.zeros().dtype),
        "examples": setting.n_train,
        "reduction": setting.engine.reduction.value,
        "losses": _some_losses(setting),
        **({} if task.precision.low is None else {"precision": task.precision.name}),
    }


def _some_losses(setting: Setting) -> list[str]:
    """Losses of a few training examples, which reveal other data of the same length and another ``loss=``."""
    task, losses = setting.engine.task, []
    with torch.no_grad():
        for k in range(min(_COMPARED, setting.n_train)):
            example = k * (setting.n_train - 1) // max(1, min(_COMPARED, setting.n_train) - 1)
            batch = task.to_device(setting.examples.one(example))
            seed_for(example)
            losses.append(task(batch).sum())
    return [f"{loss:.4e}" for (loss,) in read_numbers(losses)]
