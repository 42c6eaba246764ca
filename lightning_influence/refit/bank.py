"""What retrained models say about queries: the truth that estimates of influence are judged by."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Bank:
    """Losses of queries under models trained on subsets of the training data. ``Refit.bank`` makes one.

    Args:
        membership: [subset, train] bool.
        losses: [subset, seed, query] float64; negative measurements where a higher one is better. NaN: that model could
            not be trained.
        full: [seed, query], under models trained on everything.
        query_ids: [query].
        deterministic: a seed makes no difference: the same run with other weights of its examples.
        train_losses: [train], of the training examples under the model trained on everything; for label errors.
        notes: what a reader must know.
    """

    membership: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    full: Tensor = field(repr=False)
    query_ids: Tensor = field(repr=False)
    deterministic: bool = False
    train_losses: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.membership)

    @property
    def mean(self) -> Tensor:
        """[subset, query]: over the seeds that there are."""
        return self.losses.nanmean(1)

    @property
    def left_out(self) -> Tensor | None:
        """[subset]: the one example that each subset lacks; None where they lack more or fewer."""
        lacking = ~self.membership
        if len(self) == 0 or not bool((lacking.sum(1) == 1).all()):
            return None
        return lacking.int().argmax(1)

    @property
    def changes(self) -> Tensor:
        """[query, subset]: mean loss on the subset less mean loss on everything."""
        return (self.mean - self.full.nanmean(0)).T

    def halves(self) -> tuple[Tensor, Tensor] | None:
        """[subset, query] over either half of the seeds; None where there are fewer than two."""
        seeds = self.losses.shape[1]
        if seeds < 2:
            return None
        first = self.losses[:, : seeds // 2].nanmean(1)
        return first, self.losses[:, seeds // 2 : 2 * (seeds // 2)].nanmean(1)

    def whole(self) -> "Bank":
        """Without the subsets whose models could not be trained."""
        kept = ~self.losses.isnan().any(-1).all(1)
        return Bank(self.membership[kept], self.losses[kept], *self._rest()) if not bool(kept.all()) else self

    def _rest(self) -> tuple[Tensor, Tensor, bool, Tensor | None, tuple[str, ...]]:
        return self.full, self.query_ids, self.deterministic, self.train_losses, self.notes
