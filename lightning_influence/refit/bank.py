"""Losses of queries under retrained models: the ground truth for estimates of influence."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_influence.wording import counted


@dataclass(frozen=True)
class Bank:
    """Losses of queries under models trained on subsets of the training data. ``Refit.bank`` makes one.

    Args:
        membership: [subset, train] bool.
        losses: [subset, seed, query] float64; negative measurements where a higher one is better. NaN where a model
            could not be trained.
        full: [seed, query], the same under models trained on everything.
        query_ids: [query], indices into the queries' dataset.
        deterministic: whether models of different seeds are the same, as for ``seeds="fixed"``.
        train_losses: [train], losses of the training examples under the model trained on everything; a baseline for
            finding label errors.
        notes: what a reader of results must know.
    """

    membership: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    full: Tensor = field(repr=False)
    query_ids: Tensor = field(repr=False)
    deterministic: bool = False
    train_losses: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        subsets, train = self.membership.shape
        seeds, queries = self.losses.shape[1:]
        text = f"{counted(subsets, 'subset')} of {train:,} training examples, {counted(queries, 'query')}"
        text += f", {counted(seeds, 'seed')}"
        return f"Bank({text}{', the same for every seed' * self.deterministic})" + "".join(f"\n{n}" for n in self.notes)

    def __len__(self) -> int:
        return len(self.membership)

    @property
    def mean(self) -> Tensor:
        """[subset, query]: mean loss over the seeds whose model could be trained."""
        return self.losses.nanmean(1)

    @property
    def left_out(self) -> Tensor | None:
        """[subset]: the one example missing from each subset; None unless exactly one is missing from each."""
        missing = ~self.membership
        if len(self) == 0 or not bool((missing.sum(1) == 1).all()):
            return None
        return missing.int().argmax(1)

    @property
    def changes(self) -> Tensor:
        """[query, subset]: mean loss of models trained on the subset minus that of models trained on everything."""
        return (self.mean - self.full.nanmean(0)).T

    def halves(self) -> tuple[Tensor, Tensor] | None:
        """Two [subset, query] mean losses, one over each half of the seeds; None if there are fewer than two seeds."""
        seeds = self.losses.shape[1]
        if seeds < 2:
            return None
        first = self.losses[:, : seeds // 2].nanmean(1)
        return first, self.losses[:, seeds // 2 : 2 * (seeds // 2)].nanmean(1)

    def whole(self) -> "Bank":
        """The bank without subsets of which a model could not be trained for any seed."""
        kept = ~self.losses.isnan().any(-1).all(1)
        return replace(self, membership=self.membership[kept], losses=self.losses[kept])
