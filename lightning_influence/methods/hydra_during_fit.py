"""HyDRA by hypergradients that a tracker computes while the fit runs (Chen et al., 2021)."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.checks import check_examples, check_integer, one_of
from lightning_influence.gradients import Gradients
from lightning_influence.methods.kinds import WholeRun
from lightning_influence.methods.method import Evidence
from lightning_influence.replay.buffer_paths import note_statistics
from lightning_influence.replay.replay import MAX_DRIFT
from lightning_influence.setting.own_queries import gradients_of
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import timed
from lightning_influence.tracking.hypergradients import Hypergradients, vectors_of
from lightning_influence.tracking.record import load_record, record_name
from lightning_influence.tracking.tracker import Tracker, TrackerState
from lightning_influence.tracking.visits import Visits, add_own_products, add_products, seconds_of_visits
from lightning_influence.types import MissingEvidence


@dataclass(frozen=True)
class HyDRADuringFit(WholeRun):
    """``HyDRA`` by hypergradients that are computed while the fit runs. Made by ``HyDRA.during_fit()``.

    A hypergradient is the derivative of the weights with respect to one training example's weight in the loss.

    Needs: a fit with ``Influence(methods=[HyDRA.during_fit()])``.
    Units: query loss.
    Cost: with the Hessian, one Hessian-vector product per tracked example and step; without it, for SGD, the gradients
    of the examples at each visit, for Adam one elementwise pass over a vector of the model's size per example and step.

    Args:
        hessian: whether a changed weight changes the gradients of later steps; False: the paper's fast approximation,
            in which it does not.
        examples: ids of the training examples that get scores; None: all.
        memory: bytes of hypergradients in memory; beyond that a file is used.

    Raises:
        ValueError: other values; an optimizer that cannot be differentiated.
        MissingEvidence: a fit that ran without this method and these hyper-parameters.
    """

    hessian: bool = True
    examples: tuple[int, ...] | None = None
    memory: int = 2**30
    needs: ClassVar[Evidence] = Evidence.TRACKER
    _of_replay: ClassVar[Mapping[str, float]] = {"max_drift": MAX_DRIFT, "checks": 4}

    def __post_init__(self) -> None:
        one_of("hessian", self.hessian, (True, False))
        check_integer("memory", self.memory)
        object.__setattr__(self, "examples", check_examples(self.examples))

    @property
    def name(self) -> str:
        """``"HyDRA"``, as with the other mode."""
        return "HyDRA"

    def hyperparameters(self) -> dict[str, Any]:
        """With the mode, which tells the scores of the two classes apart."""
        return {"mode": "during_fit"} | super().hyperparameters()

    @property
    def record(self) -> str:
        """The name that earlier versions, with one class for both modes, gave to the record: theirs are found too."""
        return record_name(self.name, self.hyperparameters() | {"removal": "downweight", "runs": 1, **self._of_replay})

    def tracker(self) -> Tracker:
        """Records hypergradients, or without the Hessian what they can be computed from later."""
        if self.hessian:
            return Hypergradients(True, self.examples, self.memory)
        return Visits(self.examples, self.memory)

    def scored(self, n_train: int) -> Sequence[int] | None:
        """The tracked ``examples``."""
        return self.examples

    def unit(self, setting: Setting) -> str:
        """Loss, since the scores are predicted differences of losses."""
        return "loss"

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Products of the queries' gradients with the recorded hypergradients, [query, train]; 0 without one."""
        record, runs = self._record(setting)
        query, total = setting.final().gradients(queries), setting.zeros(queries)
        if record.facts["kind"] == "visits":
            add_products(total, setting.ids.start, query, record, runs)
        else:
            for ids, vectors in vectors_of(record, total):
                total[:, ids.to(total.device)] += query.dot(vectors)
        setting.on_block(len(setting.ids))
        if self.hessian:
            note_statistics(setting)
        return -total

    def self_influence(self, setting: Setting) -> Tensor:
        """Products of the examples' final gradients with their own recorded hypergradients, [train]; 0 without one."""
        record, runs = self._record(setting)
        total = setting.zeros()
        if record.facts["kind"] == "visits":
            add_own_products(total, setting, record, runs)
        else:
            for ids, vectors in vectors_of(record, total, setting.examples.block_size):
                total[ids.to(total.device)] = _with_own(setting, ids, vectors).to(total)
                setting.on_block(len(ids))
        if self.hessian:
            note_statistics(setting)
        return -total

    def _record(self, setting: Setting) -> tuple[TrackerState, Path]:
        """What was recorded, and the folder of all runs; the final weights are loaded."""
        assert setting.trajectory is not None
        assert setting.trajectory.path is not None
        return load_record(setting.trajectory.path, self.record, setting.final().step), setting.trajectory.path.parent

    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Time a few products with what was recorded."""
        try:
            record, runs = self._record(setting)
        except MissingEvidence:  # raised again at once when scores are computed
            return 0.0
        if queries is None:
            return self._own_seconds(setting, record, runs)
        total, query, asked = setting.zeros(queries), queries.gradients(), timed(queries.gradients)
        if record.facts["kind"] == "visits":
            add = lambda most: add_products(total, 0, query, record, runs, most)  # noqa: E731
            return asked + seconds_of_visits(add, record, runs)
        return asked + _seconds_of_blocks(record, total, None, lambda ids, vectors: query.dot(vectors))

    def _own_seconds(self, setting: Setting, record: TrackerState, runs: Path) -> float:
        total = setting.zeros()
        if record.facts["kind"] == "visits":
            return seconds_of_visits(lambda most: add_own_products(total, setting, record, runs, most), record, runs)
        size = setting.examples.block_size
        return _seconds_of_blocks(record, total, size, lambda ids, vectors: _with_own(setting, ids, vectors))


def _with_own(setting: Setting, ids: Tensor, vectors: Gradients) -> Tensor:
    """Products of the examples' final gradients with vectors, [example]."""
    ((_, final),) = gradients_of(setting, ids.tolist())
    return final.own_dot(vectors)


def _seconds_of_blocks(
    record: TrackerState, like: Tensor, most: int | None, work: Callable[[Tensor, Gradients], Any]
) -> float:
    """Estimate the seconds of work on all blocks of the recorded vectors, by the first."""
    found = [len(ids) for ids, _ in itertools.islice(vectors_of(record, like, most), 1)]
    first = timed(lambda: [work(*block) for block in itertools.islice(vectors_of(record, like, most), 1)])
    return first * len(record.tensors["ids"]) / max(1, sum(found))
