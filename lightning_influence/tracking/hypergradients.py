"""Hypergradients as vectors: derivatives of all weights with respect to the weight of each example in training."""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part
from lightning_influence.setting.setting import Queries
from lightning_influence.tracking.errors import Untrackable
from lightning_influence.tracking.micro_batch import TrackedMicroBatch
from lightning_influence.tracking.tracker import TrackedFit, TrackedStep, Tracker, TrackerState, TrackingPlan
from lightning_influence.wording import counted

# Elements of hypergradients to update at once.
_AT_ONCE = 2**24
Vectors = dict[str, Tensor]
"""[tracked, *shape] by parameter name."""


class Hypergradients(Tracker):
    """One vector per tracked example, updated at each optimizer step.

    Args:
        hessian: whether to include how a change of the weights changes later gradients, which makes them exact.
        examples: ids to track; None: all.
        memory: bytes to keep in memory at most; larger vectors are kept in memory-mapped files.
    """

    def __init__(self, hessian: bool, examples: Sequence[int] | None, memory: int) -> None:
        self.hessian, self._examples, self._memory = hessian, examples, memory
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.weights: Vectors = {}
        self.states: dict[str, Vectors] = {}
        self._slots: dict[int, int] = {}
        self._like: Vectors = {}
        self._free: list[Vectors] = []
        self._folder: Path | None = None
        self._moved = False

    # ---- the plan -------------------------------------------------------------------------------------------------

    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Allocate the vectors: zero, or those of the fit that is resumed.

        Raises:
            Untrackable: ids of no training examples.
            PlanError: the vectors do not fit on disk.
        """
        ids = list(range(fit.n_train)) if self._examples is None else sorted(set(self._examples))
        wrong = [i for i in ids if not 0 <= i < fit.n_train]
        if wrong or not ids:
            raise Untrackable(f"Expected `examples` to be ids below {fit.n_train}, got {wrong[:5] or 'none'}.")
        self.ids, self._slots = torch.tensor(ids), {i: slot for slot, i in enumerate(ids)}
        parameters = fit.engine.task.named_parameters(fit.engine.plan.names)
        self._like = {name: p.detach() for name, p in parameters.items()}
        one = sum(p.numel() * p.element_size() for p in self._like.values()) * len(ids)
        pending = fit.batch_sizes[1] if self.hessian else 0
        total, kept = one * (1 + fit.states + pending), one * (1 + fit.states)
        on_disk = total > self._memory
        self._folder = fit.folder if on_disk else None
        plan = TrackingPlan(0.0 if on_disk else float(total), float(kept + (total if on_disk else 0)), self._time(fit))
        fit.check_disk(
            plan,
            f"hypergradients of {counted(len(ids), 'example')}",
            "Track fewer `examples=`, use `HyDRA()` after the fit, or for SGD `hessian=False`, which keeps no vectors.",
        )
        self.weights = self._all_zeros()
        if state is not None:
            self._restore(state)
        return plan

    def _time(self, fit: TrackedFit) -> float:
        """Estimated time per step, relative to the plain step, from a few examples."""
        few = min(len(self.ids), 4)
        vectors = {name: p.expand(few, *p.shape).clone() for name, p in self._like.items()}
        start = time.perf_counter()
        for vector in vectors.values():
            vector.mul_(0.9).add_(vector, alpha=0.1)
        each = (time.perf_counter() - start) * (1 + fit.states)
        if self.hessian:
            times_hessian = fit.micro_batch().hessian()
            start = time.perf_counter()
            times_hessian(vectors)
            each += time.perf_counter() - start
        return each / few * len(self.ids) / max(fit.seconds, 1e-9)

    def _zeros(self, name: str) -> Tensor:
        """[tracked, *shape], in memory or in a file that disappears with the process."""
        like = self._like[name]
        shape = len(self.ids), *like.shape
        return like.new_zeros(shape) if self._folder is None else _mapped(self._folder, shape, like)

    def _all_zeros(self) -> Vectors:
        return {name: self._zeros(name) for name in self._like}

    # ---- the recursion --------------------------------------------------------------------------------------------

    def batch(self, present: TrackedMicroBatch) -> Any:
        """Changes of the step's gradient by this micro-batch: gradients of its examples, and Hessian times vectors."""
        tracked = [j for j, i in enumerate(present.ids) if i in self._slots]
        slots = torch.tensor([self._slots[present.ids[j]] for j in tracked], dtype=torch.int64)
        rows = {name: r * present.share for name, r in present.rows(tracked).items()} if tracked else {}
        if not self.hessian:
            return slots, rows, None
        changes = self._free.pop() if self._free else self._all_zeros()
        times_hessian = present.hessian() if self._moved else None
        for chunk in self._chunks():
            directions = {name: self._part(name, d, chunk) for name, d in self.weights.items()}
            found = {} if times_hessian is None else times_hessian(directions)
            for name, change in changes.items():
                change[chunk] = found.get(name, 0.0)
        return slots, rows, changes

    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """Pass the changes through clipping and the optimizer."""
        update, made = step.update, dict[str, set[str]]()
        assert update is not None
        for chunk in self._chunks():
            changes = self._changes(step, chunk)
            if update.clipping is not None:
                changes |= update.clipping.derivative(update.raw, {name: changes[name] for name in update.raw})
            for name, at in update.inputs.items():
                before = {key: self._part(name, v, chunk) for key, v in self.states.get(name, {}).items()}
                present = self._part(name, self.weights[name], chunk)
                weight, after = update.rule.tangent(at, present, changes[name], before)
                self.weights[name][chunk] = weight
                made[name] = set(after)
                for key, value in after.items():
                    self._state(name, key)[chunk] = value
        for name in update.inputs:  # state that the rule no longer keeps
            for key in self.states.get(name, {}).keys() - made.get(name, set()):
                del self.states[name][key]
        self._free += [changes for _, _, changes in step.batches if changes is not None]
        self._moved = True

    def _changes(self, step: TrackedStep, chunk: slice) -> Vectors:
        """Changes of the step's gradient before clipping, [chunk, *shape], for some of the tracked examples."""
        dense = [changes for _, _, changes in step.batches if changes is not None]
        first, last = chunk.start, chunk.stop
        total = {}
        for name, like in self._like.items():
            change = like.new_zeros(last - first, *like.shape)
            for changes in dense:
                change += self._part(name, changes[name], chunk)
            for slots, rows, _ in step.batches:
                here = (slots >= first) & (slots < last)
                if bool(here.any()):
                    change.index_add_(0, (slots[here] - first).to(like.device), rows[name][here.to(like.device)])
            total[name] = change
        return total

    def _part(self, name: str, vectors: Tensor, chunk: slice) -> Tensor:
        """Some of the vectors, which may lie in a file, on the parameter's device."""
        return vectors[chunk].to(self._like[name])

    def _chunks(self) -> Iterator[slice]:
        width = sum(p.numel() for p in self._like.values())
        step = max(1, _AT_ONCE // max(1, width))
        for start in range(0, len(self.ids), step):
            yield slice(start, min(start + step, len(self.ids)))

    def _state(self, name: str, key: str) -> Tensor:
        of_name = self.states.setdefault(name, {})
        if key not in of_name:
            of_name[key] = self._zeros(name)
        return of_name[key]

    # ---- what is written ------------------------------------------------------------------------------------------

    def state(self) -> TrackerState:
        """The vectors and their optimizer state."""
        tensors = {"ids": self.ids} | {f"weight|{name}": value for name, value in self.weights.items()}
        for name, of_name in self.states.items():
            tensors |= {f"state|{name}|{key}": value for key, value in of_name.items()}
        return TrackerState(tensors, {"kind": "vectors"})

    def _restore(self, state: TrackerState) -> None:
        if state.facts["kind"] != "vectors" or not torch.equal(state.tensors["ids"], self.ids):
            raise Untrackable(
                f"Expected the resumed fit to have tracked these {len(self.ids)} examples with this kind of optimizer, "
                "got others. Resume with the same arguments."
            )
        for key, value in state.tensors.items():
            kind, *names = key.split("|")
            if kind == "weight":
                self.weights[names[0]].copy_(value)
            elif kind == "state":
                self._state(*names).copy_(value)
        self._moved = True

    def close(self) -> None:
        """Release the vectors, and with them their files."""
        self.weights, self.states, self._free = {}, {}, []


def vectors_of(record: TrackerState, like: Tensor, most: int | None = None) -> Iterator[tuple[Tensor, Gradients]]:
    """Stored hypergradients as gradients, with their ids, in blocks of as many as are to be in memory.

    Args:
        record: of ``Hypergradients`` at the end of the fit.
        like: its dtype and device are used.
        most: no more than this many examples in a block.
    """
    ids = record.tensors["ids"]
    vectors = {n.partition("|")[2]: v for n, v in record.tensors.items() if n.startswith("weight|")}
    held = max(1, _AT_ONCE // max(1, sum(v[0].numel() for v in vectors.values())))
    for slots in torch.arange(len(ids)).split(held if most is None else min(held, most)):
        rows: dict[Names, Part] = {(name,): DenseRows((v[slots].to(like),)) for name, v in vectors.items()}
        yield ids[slots], Gradients(rows, {}, len(slots))


def _mapped(folder: Path, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros in a file that is unlinked at once where the system permits, so that a crash leaves no file."""
    handle, path = tempfile.mkstemp(prefix=".work-", suffix=".tmp", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk would end the process when the memory is written
            os.posix_fallocate(handle, 0, max(1, math.prod(shape) * like.element_size()))
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(path)
