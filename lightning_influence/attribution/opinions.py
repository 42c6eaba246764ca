"""What the model thinks of examples: their losses and its predictions, by forward passes when somebody looks."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Subset

from lightning_influence.data.lookup import Stream
from lightning_influence.data.source import Source
from lightning_influence.gradients.losses import losses_alone
from lightning_influence.gradients.predicted import predictions_of
from lightning_influence.processes import processes_of
from lightning_influence.report import Opinion
from lightning_influence.setting.session import Session


@dataclass(frozen=True)
class ModelOpinions:
    """Opinions at the final weights that a fit recorded.

    Args:
        session: has these weights.
        train: the training examples.
        queries: the queries, or None.
        stream: names the training examples, if they came from one.
    """

    session: Session
    train: Source
    queries: Source | None
    stream: Stream | None

    def __call__(self, side: str, ids: Sequence[int]) -> dict[int, Opinion]:
        """By id, of examples of the training data (``"train"``) or of the ``"queries"``.

        A warning says why there are none, since a page must not fail for them.
        """
        source = self.train if side == "train" else self.queries
        if source is None or not ids:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the question itself has told
                return self._of(source, ids)
        except Exception as error:
            warnings.warn(f"The model's predictions are not shown: {type(error).__name__}: {error}", stacklevel=2)
            return {}

    def _of(self, source: Source, ids: Sequence[int]) -> dict[int, Opinion]:
        places = list(ids)
        if self.stream is not None and source is self.train:
            places = torch.searchsorted(self.stream.ids, torch.tensor(ids)).tolist()
        with self.session.open(gradients=False) as setting:
            setting.reduction_of(None)  # it finds out how an example is read alone
            examples = self.session.examples(replace(source, dataset=Subset(source.dataset, places), workers=0))
            losses = losses_alone(setting.engine, examples).tolist()
            opinions = [Opinion(loss if math.isfinite(loss) else None) for loss in losses]
            told: list[tuple[Any, ...]] = []
            for block in examples.blocks():
                found = predictions_of(setting.engine.task, block)
                if found is None:  # what is no prediction in one block may only look like one in the others
                    return dict(zip(ids, opinions, strict=True))
                columns = [[None] * block.size if part is None else part.tolist() for part in found]
                told += zip(*columns, strict=True)
        return {i: Opinion(own.loss, *more) for i, own, more in zip(ids, opinions, told, strict=True)}


def opinions_of(session: Session, train: Source, queries: Source | None, stream: Stream | None) -> ModelOpinions | None:
    """The model's opinions; None without recorded weights, as the module's own may have changed when they are read."""
    recorded = session.own if session.trajectory is None else session.trajectory
    if processes_of(session.trainer).count > 1:  # one of them alone logs and writes pages
        return None
    return None if recorded is None else ModelOpinions(session, train, queries, stream)
