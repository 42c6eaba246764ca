"""The verdict of the checks before scoring, kept in the run: a later process checks two examples for the same question.

What is found depends on code, weights and the examples looked at, which are all in the name of the verdict. Where some
of it cannot be seen, none is kept.
"""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_influence.files import checked_json
from lightning_influence.files.regular import read_regular
from lightning_influence.gradients import Plan, Reduction, Sample
from lightning_influence.gradients.layout import Layout
from lightning_influence.gradients.tape import Use
from lightning_influence.module.code_digest import EVERYTHING, digest
from lightning_influence.module.code_libraries import Unclear
from lightning_influence.module.task import Task
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.files import write_atomically

_FORMAT = 1
_LARGEST = 2**24  # bytes
_MOST = 32  # verdicts of a run; code that is worked on gives another at each change
_PACKAGE = Path(__file__).parents[1]
# Fields of a plan; by `bytes_of_one` all processes choose the size of blocks.
_OF_PLAN: dict[str, Any] = {
    **{"separate": frozenset, "unreached": tuple, "zero": tuple},
    **{"copy_leaves": bool, "reads": bool, "closely": bool, "bytes_of_one": int},
}


@dataclass(frozen=True)
class Verdict:
    """What the checks found.

    Args:
        reduction: of the loss of a batch.
        plan: of the gradients, with layer rules only.
        uses: the functions that each parameter is passed to, by their names.
        note: on the loss in training mode, or None.
    """

    reduction: Reduction
    plan: Plan
    uses: frozenset[tuple[str, str]]
    note: str | None = None

    def plan_for(self, sample: Sample) -> Plan | None:
        """The plan, if a sample's parameters are used as those of the examples that were checked."""
        uses = frozenset().union(*(tape.uses for tape in sample.tapes))
        return replace(self.plan, uses=uses) if _names_of(uses) == self.uses else None


def _names_of(uses: frozenset[Use]) -> frozenset[tuple[str, str]]:
    return frozenset((name, f"{getattr(f, '__module__', '')}.{getattr(f, '__qualname__', f)}") for name, f in uses)


@dataclass(frozen=True)
class KeptChecks:
    """The file of one verdict.

    Args:
        path: of the file.
        key: what it is about, which it holds as well.
        names: the parameters whose gradients are taken.
    """

    path: Path
    key: str
    names: Sequence[str]

    @classmethod
    def of(cls, task: Task, sample: Sample, trajectory: Trajectory | None, index: int) -> "KeptChecks | None":
        """Where the verdict on a sample is kept; None where there is no run on disk, or there is doubt about the key.

        Args:
            task: at the weights of the last checkpoint.
            sample: that is or would be checked.
            trajectory: of the fit.
            index: of the batch, at which losses are computed.
        """
        if trajectory is None or trajectory.path is None or sample.examples.thorough:
            return None
        try:
            key = _key(task, sample, trajectory, index)
        except Exception:  # objects of any class are looked at
            return None
        return cls(trajectory.path / "checks" / f"{key[:16]}.json", key, sample.names)

    def read(self) -> Verdict | None:
        """The verdict; None if there is none, or its file is damaged."""
        try:
            found: Any = read_whole(self.path)
            if found["key"] != self.key:
                return None
            layouts = {name: Layout[layout] for name, layout in found["layouts"]}
            branches = frozenset((int(calls), int(numbers)) for calls, numbers in found["branches"])
            plan = Plan(layouts, branches=branches, **{name: kind(found[name]) for name, kind in _OF_PLAN.items()})
            if sorted(plan.names) != sorted(self.names):
                return None
            uses = frozenset((name, function) for name, function in found["uses"])
            return Verdict(Reduction(found["reduction"]), plan, uses, found["note"])
        except Exception:  # a file may hold anything
            return None

    def keep(self, reduction: Reduction, plan: Plan, note: str | None) -> None:
        """Keep a verdict, if the folder can be written to and nothing else than layer rules is used."""
        if plan.vectorised or plan.one_by_one or reduction is Reduction.TOKENS or plan.mixing is not None:
            return
        content = {
            "key": self.key,
            "reduction": reduction.value,
            "layouts": [[name, layout.name] for name, layout in plan.layouts.items()],  # vectors are in this order
            "branches": sorted(map(list, plan.branches)),
            **{n: sorted(v) if isinstance(v := getattr(plan, n), frozenset) else v for n in _OF_PLAN},
            "uses": sorted(map(list, _names_of(plan.uses))),
            "note": note,
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            write_atomically(self.path, checked_json.encode(content), durable=False)
            for file in _earlier(self.path.parent)[_MOST:]:
                file.unlink(missing_ok=True)


def _earlier(folder: Path) -> list[Path]:
    """The verdicts in a folder, the latest first; other processes may remove some meanwhile."""
    times = []
    for file in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            times.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(times, reverse=True)]


def read_whole(path: Path) -> dict[str, Any]:
    """What the file of a verdict holds.

    Raises:
        ValueError: it is damaged.
    """
    found = checked_json.decode(read_regular(path, _LARGEST))
    if found is None:
        raise ValueError(f"Expected `{path}` to be as it was written, got other content. Remove it: it is made again.")
    return found


def _key(task: Task, sample: Sample, trajectory: Trajectory, index: int) -> str:
    """Everything that the verdict depends on.

    Raises:
        Unclear: there may be more.
    """
    examples, last = sample.examples, trajectory.checkpoints[-1]
    if examples.share_of_copies is not None or sample.read is None or last.size < 0:
        raise Unclear("examples that are not read as they are, or weights without a checksum")
    tensors: dict[str, Any] = {**task.named_parameters(), **task.named_buffers()}
    saved = [tensor for name, tensor in tensors.items() if name in task.loaded]
    makers = [task.datamodule, getattr(task.trainer, "datamodule", None), examples.collate]
    about = {
        "format": _FORMAT,
        "versions": [sys.version, str(torch.__version__), str(torch.version.git_version), _stamp()],
        "code": digest(task.module, task.loss, *makers, saved=saved),
        "batches": digest(sample.read.batch, [block.batch for block in sample.blocks], names=EVERYTHING),
        "examples": [len(examples), *sample.chosen, sample.ids],
        "weights": [last.step, last.crc32],
        "parameters": [list(sample.names), [[n, str(p.dtype), list(p.shape)] for n, p in tensors.items()]],
        "settings": [
            index,
            str(task.device),
            task.exact,
            repr(task.precision),
            task.has_coarse_products,
            str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
        ],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@functools.cache
def _stamp() -> list[Any]:
    """The package's version, and when its files were written: one that is worked on changes without a new version."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _PACKAGE.rglob("*.py")]
    version = sys.modules[__name__.partition(".")[0]].__version__
    return [version, hashlib.sha256(repr(sorted(files)).encode()).hexdigest()]
