"""The index of a batch (``batch_idx``): whether the loss depends on it, and which indices examples met."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.data.examples import ChosenBlock
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.index_check import gradient_at
from lightning_influence.module.trainer_state import clock_at
from lightning_influence.module.watched_index import differing_indices
from lightning_influence.types import MissingEvidence

if TYPE_CHECKING:
    from lightning_influence.setting.setting import Setting, Stage

_LOSS = "pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses"


@dataclass(frozen=True)
class BatchIndex:
    """What a question knows about ``batch_idx``.

    Args:
        run: the gradient of a few examples as a function of the index; None with ``loss=``, which has none.
        reads: whether the code of ``training_step`` reads it. It is otherwise looked for at one checkpoint only.
        met: the indices in question, ascending.
        known: whether the fit recorded the index of every batch, with its examples.
        method: the name of the method that is not to be used where the loss depends on the index; None: there is none.
        needs_record: whether the method takes the indices from the record of the fit.
        found: results of earlier checks, by position of the checkpoint.
        of_clock: the same of ``note_clock``.
    """

    run: Callable[[Any], Mapping[str, Tensor] | None] | None = None
    reads: bool = False
    met: Sequence[int] = (0,)
    known: bool = False
    method: str | None = None
    needs_record: bool = False
    found: dict[int | None, tuple[int, int] | None] = field(default_factory=dict)

    of_clock: dict[tuple[str, int], tuple[int, int] | None] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The index at which losses are computed that have none of their own, such as those of queries."""
        return self.met[0]

    def differing(self, position: int | None) -> tuple[int, int] | None:
        """Two indices at which the loss's gradient differs, at the weights loaded now; None where none do.

        Args:
            position: of the checkpoint whose weights are loaded; None without a trajectory.

        Raises:
            ValueError: there are such indices, and the method takes each example at one loss only.
            MissingEvidence: there are, and the fit's are unknown.
        """
        if self.run is None:
            return None
        if not self.reads and self.found:
            position = next(iter(self.found))
        if position not in self.found:
            self.found[position] = differing_indices(self.run, self.met)
        pair = self.found[position]
        if pair is not None:
            self._refuse(pair)
        return pair

    def _refuse(self, pair: tuple[int, int]) -> None:
        depends = f"other gradients at `batch_idx={pair[1]}` than at `batch_idx={pair[0]}`"
        if self.method is not None:
            raise ValueError(
                f"Expected a loss that does not depend on `batch_idx` for `{self.method}`, which takes one loss per "
                f"example, got {depends}. Use `TracInCP()`, `TracIn()` or `HyDRA()`, which take an example at the "
                f"index of each of its steps, or {_LOSS}."
            )
        if self.needs_record and not self.known:
            raise MissingEvidence(
                f"Expected a record of the index (`batch_idx`) and the examples of every batch, since the loss depends "
                f"on the index, got none, and {depends}. Fit again with `Trainer(callbacks=[Influence()])`, whose "
                f"record has both, or {_LOSS}."
            )

    def note(self, pair: tuple[int, int], queries: bool, measured: bool) -> str:
        """A sentence for readers of the scores."""
        text = (
            f"The loss depends on `batch_idx` (it differs between {pair[0]} and {pair[1]}): a training example counts "
            "with its loss at the index of each step with it"
        )
        if measured:
            return f"{text}."
        if not queries:
            return f"{text}, also as its own query."
        return (
            f"{text}; a query has no index, and its loss is that at `batch_idx={self.first}`. Pass `measurement=` for "
            "another."
        )


def visit_blocks(stage: "Stage") -> Iterator[tuple[list[int], Tensor, Gradients]]:
    """Gradients of the tile's examples at each index of the batches that they met since the checkpoint before.

    Args:
        stage: ``by_index``.

    Yields:
        Ids of a block's examples, the weights of their visits at one index, [group, example], and their gradients.
    """
    setting, position = stage.setting, stage.position
    assert setting.trajectory is not None
    assert position is not None
    about = setting.engine.reduction.coefficient(), setting.n_train, setting.engine.weights
    visits = setting.trajectory.visits(position, *about)
    used = (visits.ids >= setting.ids.start) & (visits.ids < setting.ids.stop) & visits.weights.any(0)
    indices, counts = visits.indices[used].unique_consecutive(return_counts=True)
    sections = zip(
        indices.tolist(),
        visits.ids[used].split(counts.tolist()),
        visits.weights[:, used].split(counts.tolist(), 1),
        strict=True,
    )
    examples = setting.examples
    for index, of_index, weights in sections:
        for part in torch.arange(len(of_index)).split(examples.block_size):
            some = of_index[part].tolist()
            block = ChosenBlock(some[0], len(some), examples.some(some), examples.one, some)
            stage.check_loaded()
            with setting.task.at(index):
                gradients = setting.engine.gradients(block)
            yield some, weights[:, part], gradients
    setting.on_block(len(setting.ids))


def visits_per_example(setting: "Setting", positions: Sequence[int]) -> float:
    """Passes per training example and checkpoint: 1 unless the loss depends on the index of a batch."""
    index, trajectory = setting.batch_index, setting.trajectory
    if trajectory is None or not index.known or not any(index.found.values()):
        return 1.0
    counts = [len(trajectory.visits(k, setting.engine.reduction.coefficient(), setting.n_train).ids) for k in positions]
    return max(1.0, sum(counts) / max(1, len(counts) * setting.n_train))


def note_clock(stage: "Stage") -> None:
    """Note a loss that differs among the numbers of step or epoch since the checkpoint before, of which it has one."""
    setting, position, trajectory = stage.setting, stage.position, stage.setting.trajectory
    if trajectory is None or position is None:
        return
    known = setting.batch_index.of_clock
    for name, numbers in trajectory.clock(position).items():
        if (name, position) not in known:
            put = functools.partial(_put, setting.task.module, name)
            run = gradient_at(setting.task, setting.examples, setting.engine.plan.names, put)
            known[name, position] = differing_indices(run, numbers)
        pair = known[name, position]
        if pair is not None and not any(note.startswith(f"The loss depends on `{name}`") for note in setting.notes):
            setting.note(
                f"The loss depends on `{name}` (it differs between {pair[0]} and {pair[1]}): gradients are taken at "
                "the checkpoints' own. `TracIn()` and `HyDRA()` follow every step."
            )


def _put(module: Any, name: str, number: int) -> AbstractContextManager[None]:
    return clock_at(module, **{"step" if name == "global_step" else "epoch": number})


def warn_of_losses(setting: "Setting") -> None:
    """Warn where losses at the weights loaded now depend on the index of a batch."""
    index, task = setting.batch_index, setting.task
    if index.run is None:
        return
    with torch.enable_grad():
        pair = differing_indices(gradient_at(task, setting.examples, (), task.at), index.met)
    if pair is not None:
        setting.warn(f"The loss depends on `batch_idx`: losses are those at `batch_idx={index.first}`.")
