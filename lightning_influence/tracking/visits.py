"""Hypergradients without vectors: the factored gradients of each visit, and one coefficient per visit."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.clipping import ByNorm, Clipping
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import timed
from lightning_influence.tracking.errors import Untrackable
from lightning_influence.tracking.hypergradients import Hypergradients
from lightning_influence.tracking.micro_batch import TrackedMicroBatch
from lightning_influence.tracking.record import load, save
from lightning_influence.tracking.serialization import decode, encode
from lightning_influence.tracking.tracker import TrackedFit, TrackedStep, Tracker, TrackerState, TrackingPlan
from lightning_influence.types import MissingEvidence, bytes_in

# Visits that are timed for an estimate.
_FEW = 10
_WEIGHT, _GRADIENT = "weight", "gradient"
_SEGMENT = re.compile(r"(.*[/\\])?run-\d+[/\\]trackers[/\\][^/\\]+[/\\]visits-\d+(\.crc[0-9a-f]{8})?\.pt")


class Visit(TypedDict):
    """The examples of a micro-batch at one step, as a segment holds them.

    Args:
        ids: of the examples.
        share: factor of each example's loss in the loss of the step, whose gradient is g.
        step: counted from 0.
        factor: clipping by norm makes factor u - along <g, u> g of a change u of the gradient.
        along: likewise.
        pulled: <g, gradient>, [example], where ``along`` is not 0.
        parts: the examples' gradients, encoded.
    """

    ids: list[int]
    share: float
    step: int
    factor: float
    along: float
    pulled: Tensor | None
    parts: list[tuple[list[str], dict[str, Any]]]


class Visits(Tracker):
    """Hypergradients without the Hessian, for optimizers that treat all entries of a parameter alike.

    The hypergradient of an example is then a sum over its visits (the steps that trained on it) of a coefficient times
    the gradient at the visit. Gradients are stored as factors, in segments on disk; coefficients are computed at the
    end, from the steps made.

    Args:
        examples: ids to track with ``Hypergradients``, for other optimizers; None: all.
        memory: bytes of factors to collect before a segment is written.
    """

    def __init__(self, examples: Sequence[int] | None, memory: int) -> None:
        self._examples, self._memory = examples, memory
        self._folder = Path()
        self._names: list[str] = []
        self._kinds: list[dict[str, dict[str, float]]] = []
        self._known: dict[str, int] = {}
        self._path: list[list[int]] = []  # [step][name]: index into `_kinds`, -1 if the parameter was not updated
        self._segments: list[str] = []
        self._pending: list[Visit] = []
        self._bytes = 0

    def chosen(self, fit: TrackedFit) -> Tracker:
        """``Hypergradients`` without the Hessian where the optimizer treats entries of a parameter differently."""
        return self if fit.uniform else Hypergradients(False, self._examples, self._memory)

    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Estimate the cost, and continue from the state of a resumed fit.

        Raises:
            PlanError: the factors do not fit on disk.
        """
        self._folder, self._names = fit.folder, list(fit.engine.plan.names)
        sample = fit.micro_batch()
        each, seconds = sample.gradients().query_bytes(1), timed(sample.gradients)
        size, accumulated = fit.batch_sizes
        visits = None if fit.steps is None else fit.steps * accumulated * (size or 1)
        disk = None if visits is None else float(visits * each)
        plan = TrackingPlan(
            float(self._memory if disk is None else min(disk, self._memory)), disk, seconds / fit.seconds
        )
        fit.check_disk(
            plan,
            f"the factors of {visits or 0:,} visits",
            "Use `HyDRA(hessian=False)`, which keeps two numbers per query and example, or fewer epochs.",
        )
        if state is not None:
            self._restore(state, fit.resumed)
        return plan

    def batch(self, present: TrackedMicroBatch) -> Any:
        """The factored gradients of the micro-batch."""
        return present.share, present.gradients()

    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """Record how the step transforms earlier visits, and add its own."""
        update = step.update
        assert update is not None
        keys: dict[tuple[int, bool], int] = {}
        path = []
        for name in self._names:
            at = update.inputs.get(name)
            if at is None:
                path.append(-1)
                continue
            key = id(at.options), bool(at.state)
            if key not in keys:
                keys[key] = self._kind(update.rule, at)
            path.append(keys[key])
        self._path.append(path)
        factor, along = _clipped(update.clipping, update.raw)
        for ids, (share, gradients) in zip(step.ids, step.batches, strict=True):
            products = gradients.times(_whole(update.raw, gradients)) if along else None
            visit: Visit = {
                "ids": list(ids),
                "share": share,
                "step": len(self._path) - 1,
                "factor": factor,
                "along": along,
                "pulled": None if products is None else products.cpu(),
                "parts": encode(gradients),
            }
            self._pending.append(visit)
            self._bytes += bytes_in(visit["parts"])
            if self._bytes > self._memory:
                self._flush()

    def state(self) -> TrackerState:
        """Names of the segments, and the kind of each step."""
        self._flush()
        facts = {"kind": "visits", "names": self._names, "kinds": self._kinds, "segments": list(self._segments)}
        path = torch.tensor(self._path, dtype=torch.int32).view(len(self._path), len(self._names))
        return TrackerState({"path": path}, facts)

    def _restore(self, state: TrackerState, runs: Path | None) -> None:
        if state.facts["kind"] != "visits" or state.facts["names"] != self._names:
            raise Untrackable(
                "Expected the resumed fit to have had this kind of optimizer and these parameters, got others. Resume "
                "with the same arguments."
            )
        self._kinds, self._segments = list(state.facts["kinds"]), list(state.facts["segments"])
        if runs is not None and runs != self._folder.parents[2]:
            self._segments = [str(runs / segment) for segment in self._segments]
        self._path = state.tensors["path"].tolist()

    def _flush(self) -> None:
        """Write a segment, and note its path relative to the folder of all runs."""
        if self._pending:
            path = save(self._folder / f"visits-{len(self._segments):08d}.pt", self._pending)
            self._segments.append(path.relative_to(self._folder.parents[2]).as_posix())
            self._pending, self._bytes = [], 0

    def _kind(self, rule: UpdateRule, at: UpdateInput) -> int:
        """Index into `_kinds` of this step: its coefficients from weight, state and gradient to weight and state."""
        key = repr((type(rule).__name__, sorted(at.options.items(), key=lambda item: item[0]), sorted(at.state)))
        if key not in self._known:
            self._known[key] = len(self._kinds)
            self._kinds.append(coefficients(rule, at))
        return self._known[key]


def coefficients(rule: UpdateRule, at: UpdateInput) -> dict[str, dict[str, float]]:
    """{after: {before: coefficient}} of one step, over weight, gradient and optimizer state, for a uniform rule."""
    inputs = [_WEIGHT, *sorted(at.state), _GRADIENT]
    unit = torch.eye(len(inputs), dtype=torch.float64)
    state = {name: unit[i] for i, name in enumerate(inputs) if name in at.state}
    zero = torch.zeros((), dtype=torch.float64)
    like = replace(at, weight=zero, gradient=zero)
    weight, after = rule.tangent(like, unit[0], unit[-1], state)
    return {
        name: {inputs[i]: float(value) for i, value in enumerate(row) if float(value)}
        for name, row in {_WEIGHT: weight, **after}.items()
    }


def _by_step(state: TrackerState) -> tuple[list[list[str]], list[Tensor]]:
    """Groups of parameters that were always updated alike, and for each the coefficients of visits, [step]."""
    columns, of_name = state.tensors["path"].unique(dim=1, return_inverse=True)
    names: list[list[str]] = [[] for _ in columns.T]
    for name, column in zip(state.facts["names"], of_name.tolist(), strict=True):
        names[column].append(name)
    return names, [_backwards(column.tolist(), state.facts["kinds"]) for column in columns.T]


def _backwards(path: Sequence[int], kinds: Sequence[Mapping[str, Mapping[str, float]]]) -> Tensor:
    reach = {_WEIGHT: 1.0}  # derivative of the final weight with respect to weight and state after the step
    counts = torch.zeros(len(path), dtype=torch.float64)
    for step in reversed(range(len(path))):
        if path[step] < 0:
            continue
        before: dict[str, float] = {}
        for after, row in kinds[path[step]].items():
            for name, number in row.items():
                before[name] = before.get(name, 0.0) + reach.get(after, 0.0) * number
        counts[step] = before.pop(_GRADIENT, 0.0)
        reach = before
    return counts


def add_products(
    total: Tensor, first: int, query: QueryGradients, state: TrackerState, runs: Path, most: int | None = None
) -> None:
    """Add the products of query gradients with hypergradients to ``total``.

    Args:
        total: [query, train] of a tile, modified in place.
        first: id of its first column.
        query: gradients at the final weights.
        state: of ``Visits`` at the end of the fit.
        runs: folder of all runs.
        most: no more than this many visits, for an estimate; None: all.
    """
    groups, by_step = _by_step(state)
    window: list[tuple[Visit, list[Tensor]]] = []
    for visit in _visits(state, runs, most):
        if window and window[-1][0]["step"] != visit["step"]:
            _add_step(total, first, window, by_step)
            window = []
        gradients = decode(visit["parts"], len(visit["ids"]), total.device)
        window.append((visit, [query.dot(gradients.only(names)).to(total) for names in groups]))
    if window:
        _add_step(total, first, window, by_step)


def add_own_products(total: Tensor, setting: Setting, state: TrackerState, runs: Path, most: int | None = None) -> None:
    """Add the products of the examples' final gradients with their own hypergradients to ``total``.

    Args:
        total: [train], modified in place.
        setting: the question; the final weights are loaded.
        state: of ``Visits`` at the end of the fit.
        runs: folder of all runs.
        most: no more than this many visits, for an estimate; None: all.
    """
    groups, by_step = _by_step(state)
    shown, steps = 0, max(1, len(by_step[0]))
    for step, of_step in itertools.groupby(_visits(state, runs, most), lambda visit: visit["step"]):
        window = [(visit, decode(visit["parts"], len(visit["ids"]), total.device)) for visit in of_step]
        for names, counts in zip(groups, by_step, strict=True):
            if number := float(counts[step]):
                _add_own_step(total, setting, [(visit, found.only(names)) for visit, found in window], number)
        now = setting.n_train * (step + 1) // steps
        setting.on_block(now - shown)
        shown = now


def _add_own_step(total: Tensor, setting: Setting, window: list[tuple[Visit, Gradients]], number: float) -> None:
    whole: dict[str, Tensor] = {}  # the step's gradient, where clipping by norm couples its examples
    for visit, found in window:
        if visit["pulled"] is not None:
            for name, value in found.total().items():
                whole[name] = whole.get(name, 0) + visit["share"] * value
    for visit, found in window:
        final = setting.engine.gradients(setting.examples.chosen(visit["ids"]))
        part = final.own_dot(found) * (visit["share"] * visit["factor"])
        if visit["pulled"] is not None:
            along = final.only(whole).times(whole)
            part = part - along * (visit["share"] * visit["along"] * visit["pulled"].to(part))
        total.index_add_(0, torch.tensor(visit["ids"]).to(total.device), (number * part).to(total))


def seconds_of_visits(add: Callable[[int], Any], state: TrackerState, runs: Path) -> float:
    """Estimate the seconds of work on all visits, by those of a few: ``add`` is called with how many to take."""
    segments = state.facts["segments"]
    count = len(load(_inside(runs, segments[0]))) * len(segments) if segments else 0
    one, few = timed(lambda: add(1)), timed(lambda: add(1 + _FEW))
    return one + max(0.0, few - one) * max(0, count - 1) / _FEW


def _visits(state: TrackerState, runs: Path, most: int | None) -> Iterator[Visit]:
    visits = (visit for segment in state.facts["segments"] for visit in load(_inside(runs, segment)))
    return itertools.islice(visits, most)


def _inside(runs: Path, segment: str) -> Path:
    """The path of a segment, which is a tracker's own, of this run or of one that it resumed.

    Raises:
        MissingEvidence: it is another file.
    """
    if _SEGMENT.fullmatch(segment) is None or ".." in Path(segment).parts:
        raise MissingEvidence(f"Expected a tracker's file beside `{runs}`, got {segment!r:.200}. Fit again.")
    return runs / segment


def _add_step(total: Tensor, first: int, window: list[tuple[Visit, list[Tensor]]], by_step: list[Tensor]) -> None:
    """Add one step's visits, from all its micro-batches together: clipping by norm couples them."""
    for k, counts in enumerate(by_step):
        number = float(counts[window[0][0]["step"]])
        if not number:
            continue
        whole = torch.stack([(products[k] * visit["share"]).sum(1) for visit, products in window]).sum(0)
        for visit, products in window:
            part = products[k] * (visit["share"] * visit["factor"])
            if visit["pulled"] is not None:
                part = part - whole[:, None] * (visit["share"] * visit["along"] * visit["pulled"].to(part))
            ids = torch.tensor(visit["ids"]) - first
            here = (ids >= 0) & (ids < total.shape[1])
            total.index_add_(1, ids[here].to(total.device), (number * part[:, here]).to(total))


def _clipped(clipping: Clipping | None, raw: Mapping[str, Tensor]) -> tuple[float, float]:
    """``factor`` and ``along`` of a ``Visit``, from the clipping and the gradient before it."""
    if not isinstance(clipping, ByNorm):
        return 1.0, 0.0
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in raw.values()])))
    factor = clipping.limit / (norm + 1e-6)
    return (1.0, 0.0) if factor >= 1.0 else (factor, clipping.limit / ((norm + 1e-6) ** 2 * norm))


def _whole(raw: Mapping[str, Tensor], gradients: Gradients) -> dict[str, Tensor]:
    names = [(n, shape) for names, p in gradients.parts.items() for n, shape in zip(names, p.shapes(), strict=True)]
    like = next(iter(raw.values()))
    return {name: raw[name] if name in raw else like.new_zeros(shape) for name, shape in names}
