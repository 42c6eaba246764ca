"""Tracks the losses of the queries, and attributes each step's change to the example that the step trained on."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.gradients.losses import Losses
from lightning_influence.setting.setting import Queries
from lightning_influence.tracking.errors import Untrackable
from lightning_influence.tracking.tracker import TrackedFit, TrackedStep, Tracker, TrackerState, TrackingPlan
from lightning_influence.wording import counted

_INSTEAD = "With larger batches, use `TracIn()`, which divides a step among its examples to first order."


class LossChanges(Tracker):
    """[query, train]: sum over the steps that trained on an example, of the query's loss before minus after."""

    sees_queries: ClassVar[bool] = True
    differentiates: ClassVar[bool] = False

    def __init__(self) -> None:
        self.changes = torch.zeros(0, 0)
        self.losses = torch.zeros(0)
        self._losses = Losses()

    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Compute the losses at the initial weights.

        Raises:
            Untrackable: batches of more than one example; no queries.
        """
        if fit.queries is None:
            raise Untrackable(
                "Expected `queries` before the fit, got None: `TracInIdeal` computes their losses at every step. Pass "
                "`Influence(queries=)`."
            )
        size, accumulated = fit.batch_sizes
        if (size or 1) * accumulated > 1:
            raise Untrackable(
                f"Expected batches of one example, got `batch_size={size}` and "
                f"`accumulate_grad_batches={accumulated}`: the change of a loss has no single cause. {_INSTEAD}"
            )
        self.losses = self.losses_of(fit.queries)
        if state is None:
            self.changes = torch.zeros(len(self.losses), fit.n_train, dtype=torch.float64)
        else:
            self.changes = state.tensors["changes"].clone()
            if self.changes.shape != (len(self.losses), fit.n_train):
                raise Untrackable(
                    f"Expected the {len(self.changes)} queries that the resumed fit had, got {len(self.losses)}."
                )
        return TrackingPlan(2.0 * self.changes.numel() * self.changes.element_size(), None, None)

    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """Attribute the change of the losses to the step's example."""
        ids = [i for batch in step.ids for i in batch]
        if len(ids) != 1:
            raise Untrackable(f"a step had {counted(len(ids), 'example')}. {_INSTEAD}")
        assert queries is not None
        now = self.losses_of(queries)
        self.changes[:, ids[0]] += self.losses - now
        self.losses = now

    def state(self) -> TrackerState:
        """The changes so far, and the current losses."""
        return TrackerState({"changes": self.changes.clone(), "losses": self.losses.clone()})

    def losses_of(self, queries: Queries) -> Tensor:
        """Losses of all queries, [query] float64."""
        blocks = queries.examples.blocks(queries.ids.start, queries.ids.stop)
        return torch.cat([self._losses(queries.engine, block) for block in blocks]).cpu()
