"""PlainLoss: the loss of each example, alone or as the mean over checkpoints; the list of suspect labels to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from lightning_influence.checks import check_not_empty
from lightning_influence.gradients import Reduction
from lightning_influence.gradients.losses import Losses, losses_alone
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.setting.batch_index import warn_of_losses
from lightning_influence.setting.checkpoints import stage_positions
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import Work, timed
from lightning_influence.trajectory import Trajectory

LABELS = "labels"
"""Name of the list of suspect labels among the results."""


@dataclass(frozen=True)
class PlainLoss(ForwardOnly):
    r"""The loss of each example on its own, in eval mode; no influence, but a good list of labels to check.

    .. math:: s(z) = \frac{1}{K} \sum_k \ell(w_k, z)

    Source: Pleiss et al. Identifying Mislabeled Data using the Area Under the Margin Ranking. NeurIPS 2020, for the
    mean over training (of margins); losses of a fit that memorised its data tell little at the end.
    Needs: the final weights, or checkpoints.
    Units: loss.
    Cost: one forward pass per example and checkpoint.

    Args:
        checkpoints: positions of checkpoints in the trajectory whose losses are averaged; "all": all but the initial
            weights; None: the final weights alone.
    """

    checkpoints: Sequence[int] | str | None = None
    quantity: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if isinstance(self.checkpoints, str) and self.checkpoints != "all":
            raise ValueError(f"Expected `checkpoints` to be positions, 'all' or None, got {self.checkpoints!r}.")
        check_not_empty("checkpoints", self.checkpoints)

    @property
    def name(self) -> str:
        """What the list is for."""
        return LABELS

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """Those of ``checkpoints``; the last for None."""
        if self.checkpoints is None:
            return super().positions(trajectory)
        return stage_positions(trajectory, None if isinstance(self.checkpoints, str) else self.checkpoints)

    def score(self, setting: Setting, queries: Queries) -> NoReturn:
        """Raises NotImplementedError: a loss is about one example alone."""
        raise NotImplementedError("`PlainLoss` has no scores on queries. Use `TracInCP()`, which has.")

    def self_influence(self, setting: Setting) -> Tensor:
        """The losses, [train] float64."""
        warn_of_losses(setting)
        total = torch.zeros(setting.n_train, dtype=torch.float64)
        positions = [None] if self.checkpoints is None else self.positions(setting.trajectory)
        for position in positions:
            if position is not None:
                setting.load(position)
            total += losses_alone(setting.engine, setting.examples, setting.on_block)
        empty = total.isnan().nonzero()[:, 0].tolist()
        if empty and setting.reduction_of(None) is Reduction.TOKENS:
            setting.note(
                f"Examples without tokens have no loss, and 0 here: {empty[:5]}{' and more' * (len(empty) > 5)}"
            )
            total[empty] = 0
        return total / len(positions)

    def unit(self, setting: Setting) -> str:
        """That of the loss."""
        return "loss"

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """One forward pass per example and checkpoint."""
        setting.reduction_of(None)  # it finds out how an example is read alone
        samples, visited, losses_of = Samples.of(setting), self._visited(setting), Losses()
        losses_of(setting.engine, samples.block)  # which way they are computed is found out once
        each = timed(lambda: losses_of(setting.engine, samples.block)) / samples.block.size
        return [samples.reading(visited), Work("forward passes", visited * setting.n_train, each)]
