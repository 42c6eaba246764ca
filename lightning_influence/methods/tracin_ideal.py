"""TracInIdeal: what a query's loss really did at the steps that visited an example (Pruthi et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.methods.method import Evidence, Method
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking import Tracker, load_record, record_name
from lightning_influence.tracking.losses import LossChanges
from lightning_influence.types import MissingEvidence


@dataclass(frozen=True)
class TracInIdeal(Method):
    r"""The change of a query's loss, summed over the steps that trained on the example alone: exact, no gradient in it.

    .. math:: s(q, z_i) = \sum_{t: z_t = z_i} \ell(w_t, q) - \ell(w_{t+1}, q)

    Over all examples the scores of a query add up to what its loss fell by during the fit.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020.
    Needs: to watch the fit, with batches of one example and ``Influence(queries=)``.
    Units: query loss.
    Cost: the losses of all queries at every step, during the fit.

    Raises:
        MissingEvidence: asked for a fit that it did not watch, or for other queries.
    """

    needs: ClassVar[Evidence] = Evidence.TRACKER

    def tracker(self) -> Tracker:
        """Follows the losses of the queries."""
        return LossChanges()

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        assert setting.trajectory is not None
        stage = setting.final()
        record = load_record(setting.trajectory.path, record_name("TracInIdeal", self.settings()), stage.step)
        changes, there = record.tensors["changes"], record.tensors["losses"]
        if queries.mean:
            changes, there, asked = changes.mean(0, keepdim=True), there.mean(0, keepdim=True), slice(0, 1)
        else:
            asked = slice(queries.ids.start, queries.ids.stop)
        now = queries.once((self, stage.step), lambda: LossChanges().losses_of(queries))
        now = now.mean(0, keepdim=True) if queries.mean else now
        if len(there[asked]) != len(now) or not torch.allclose(there[asked], now, rtol=1e-3, atol=1e-4):
            raise MissingEvidence(
                f"Expected the {len(record.tensors['losses'])} queries whose losses were followed during the fit, got "
                "queries with other losses. `TracInIdeal` answers for those of `Influence(queries=)` only; use "
                "`TracInCP()` for others."
            )
        total = setting.zeros(queries)
        total += changes[asked, setting.ids.start : setting.ids.stop].to(total)
        setting.on_block(len(setting.ids))
        return total

    def unit(self, setting: Setting) -> str:
        """Loss."""
        return "loss (at the moments the example was seen)"
