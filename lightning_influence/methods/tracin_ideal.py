"""TracInIdeal: the true change of a query's loss at the steps with an example (Pruthi et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.methods.kinds import WholeRun
from lightning_influence.methods.method import Evidence
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import timed
from lightning_influence.tracking.losses import LossChanges
from lightning_influence.tracking.record import load_record
from lightning_influence.tracking.tracker import Tracker
from lightning_influence.types import MissingEvidence
from lightning_influence.wording import counted


@dataclass(frozen=True)
class TracInIdeal(WholeRun):
    r"""How much a query's loss really fell at the steps whose batch was just this example; no gradients, no estimate.

    .. math:: s(q, z_i) = \sum_{t: z_t = z_i} \ell(w_t, q) - \ell(w_{t+1}, q)

    The scores of a query sum to the decrease of its loss during the fit.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020.
    Needs: a fit with batches of one example and ``Influence(methods=[TracInIdeal()], queries=...)``.
    Units: query loss.
    Cost: during the fit, the losses of all queries at every step.

    Raises:
        MissingEvidence: a fit that ran without this method, or other queries than those of the fit.
    """

    needs: ClassVar[Evidence] = Evidence.TRACKER

    def tracker(self) -> Tracker:
        """Records the losses of the queries."""
        return LossChanges()

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """The recorded changes of the queries' losses, [query, train].

        Raises:
            MissingEvidence: the losses of these queries were not recorded.
        """
        assert setting.trajectory is not None
        record = load_record(setting.trajectory.path, self.record, setting.final().step)
        changes, losses = (record.tensors[name][queries.ids.start : queries.ids.stop] for name in ("changes", "losses"))
        now = LossChanges().losses_of(queries)
        if queries.mean:
            changes, losses, now = (values.mean(0, keepdim=True) for values in (changes, losses, now))
        if len(losses) != len(now) or not torch.allclose(losses, now, rtol=1e-3, atol=1e-4):
            raise MissingEvidence(
                f"Expected the {counted(len(record.tensors['losses']), 'query')} whose losses were recorded during the "
                "fit, got queries with other losses. `TracInIdeal` scores those of `Influence(queries=)` only; use "
                "`TracInCP()` for others."
            )
        setting.on_block(len(setting.ids))
        return changes[:, setting.ids.start : setting.ids.stop].to(setting.zeros())

    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Time the losses of the queries."""
        return 0.0 if queries is None else timed(lambda: LossChanges().losses_of(queries))

    def unit(self, setting: Setting) -> str:
        """Loss, since the scores are differences of losses."""
        return "loss (at the steps with the example)"
