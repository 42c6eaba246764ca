"""Makes scores of numbers: with the ids of the examples, the record, and the datasets at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_influence.attribution.accumulators import MatrixAccumulator, TopKAccumulator
from lightning_influence.attribution.final_weights import FinalWeights
from lightning_influence.attribution.finished import Finished, Kept, Part
from lightning_influence.attribution.magnitude import FLAG
from lightning_influence.attribution.opinions import opinions_of
from lightning_influence.data.lists import Rows
from lightning_influence.data.lookup import Stream
from lightning_influence.data.source import Source
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Method
from lightning_influence.methods.retraining import Retraining
from lightning_influence.report import Opinions
from lightning_influence.scores import Scores, SelfScores, TopK
from lightning_influence.setting.setting import Setting


@dataclass(frozen=True)
class Answers:
    """The answer to one question.

    Args:
        method: computes it.
        setting: the question.
        final: which weights are the final ones.
        train: the training examples.
        stream: names them, if they came from one.
        queries: None: the mean over all queries, or self-influence.
    """

    method: Method
    setting: Setting
    final: FinalWeights
    train: Source
    stream: Stream | None
    queries: Source | None = None

    def scores(
        self,
        result: tuple[Tensor | None, tuple[TopK, TopK] | None],
        columns: Tensor,
        rows: Tensor,
        record: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Scores of training examples and queries at these positions."""
        base, queried = self.train.base_ids(), None if self.queries is None else self.queries.base_ids()
        scores = Scores(
            *result,
            self._named(columns),
            self._named(rows, self.queries),
            base=(None if base is None else base[columns], None if queried is None else queried[rows]),
            allow_nan=isinstance(self.method, Retraining),
            **(record or self.record()),
        )
        scores.at_hand = (self._shown(self.train), None if self.queries is None else self._shown(self.queries))
        scores.opinions = self._opinions()
        return scores

    def self_scores(self, values: Tensor, columns: Tensor, record: Mapping[str, Any] | None = None) -> SelfScores:
        """Self-influence of training examples at these positions."""
        base = self.train.base_ids()
        base = None if base is None else base[columns]
        about = {"base": base, "quantity": self.method.quantity, **(record or self.record())}
        scores = SelfScores(self._named(columns), values, **about)
        scores.at_hand = (self._shown(self.train), None)
        scores.opinions = self._opinions()
        return scores

    def finished_scores(
        self, accumulator: MatrixAccumulator | TopKAccumulator, finished: Finished, ids: Tensor, said: str
    ) -> Kept | None:
        """Those scores that were finished, and which they are; None if there are none."""
        matrix = accumulator.values if isinstance(accumulator, MatrixAccumulator) else None
        part = finished.part(matrix, len(ids), isinstance(self.method, Retraining))
        if part is None:
            return None
        top = accumulator.result(len(part.rows))[1] if isinstance(accumulator, TopKAccumulator) else None
        result = part.values, top if part.values is None else None
        says, record = self._narrowed(part, said, len(self.setting.queries or ()), len(ids))
        return self.scores(result, ids[part.columns], part.rows, record), says

    def finished_self_scores(self, finished: Finished, ids: Tensor, said: str) -> Kept | None:
        """That self-influence which was finished, and which it is; None if there is none."""
        part = finished.part(None, len(ids))
        if part is None or part.values is None:
            return None
        says, record = self._narrowed(part, said, None, len(ids))
        return self.self_scores(part.values[0], ids[part.columns], record), says

    def record(self) -> dict[str, Any]:
        """What the scores are, and what a reader must know about them."""
        method, setting, precision = self.method, self.setting, self.setting.task.precision.name
        checkpoints: list[int] = []
        notes = list(setting.notes)
        if not isinstance(method, ForwardOnly):
            notes.append(setting.engine.plan.summary(setting.engine.task.named_parameters()))
        engines = [setting.engine, *([] if setting.queries is None else [setting.queries.engine])]
        notes += [note for engine in engines if (note := engine.guard.note()) is not None]
        notes += setting.task.notes
        notes += self.final.notes_for(method)
        trajectory = setting.trajectory
        if trajectory is not None:
            checkpoints = [trajectory.checkpoints[i].step for i in method.positions(trajectory)]
            notes += trajectory.notes
        return {
            "method": method.name,
            "settings": method.hyperparameters() | ({} if precision is None else {"precision": precision}),
            "units": "arbitrary" if FLAG in setting.diagnostics else method.unit(setting),
            "notes": notes,
            "checkpoints": checkpoints,
            "diagnostics": setting.diagnostics,
        }

    def _narrowed(self, part: Part, said: str, n_queries: int | None, n_columns: int) -> tuple[str, dict[str, Any]]:
        """Which scores a part is, and its record, of which that is the first note."""
        record = self.record()
        says = part.says(n_queries, n_columns, len(record["checkpoints"]))
        steps = record["checkpoints"] if part.steps is None else part.steps
        return says, record | {"notes": [f"{said}; these are {says}.", *record["notes"]], "checkpoints": steps}

    def _named(self, positions: Tensor, source: Source | None = None) -> Tensor:
        """Ids of training examples by their positions; of queries that are other data, the positions."""
        if self.stream is None or (source is not None and source is not self.train):
            return positions
        return self.stream.ids[positions]

    def _opinions(self) -> Opinions | None:
        return opinions_of(self.final.session_of(self.method), self.train, self.queries, self.stream)

    def _shown(self, source: Source) -> Any:
        if self.stream is not None and source is self.train:
            return self.stream.by_id
        return source.dataset.dataset if isinstance(source.dataset, Rows) else source.dataset
