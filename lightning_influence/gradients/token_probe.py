"""Finds over what a batch's loss is a mean: compares the gradients of a few batches with those of their examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.gradients.sample import Sample
from lightning_influence.gradients.token_counts import CountWatch, Key, TokenCounter, per_example
from lightning_influence.module.random_state import seed_for

# Gradients of this many examples are compared.
_COMPARED = 8


@dataclass
class GradientProbe:
    """Compares the gradients of a few batches with weighted means of the gradients of their examples.

    Args:
        sample: of the dataset.
        ids: examples with finite losses.
        totals: what was counted in each of them, by operation.
    """

    sample: Sample
    ids: Sequence[int]
    totals: Mapping[Key, Mapping[int, float]]
    _singles: dict[int, Tensor] = field(default_factory=dict)
    _batches: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chosen = self._most_unlike()
        sizes = (2, 3, 5, len(self.chosen)) if self.sample.few is None else (2, len(self.chosen))
        self._sizes = sorted({min(n, len(self.chosen)) for n in sizes})

    def holds(self, weights: Mapping[int, float], roughly: bool = False) -> bool:
        """Whether the gradient of each batch is the mean of its examples' with these weights.

        Args:
            weights: of the examples.
            roughly: only in norm and to a few digits; otherwise in each entry and up to rounding errors.
        """
        if not self.sample.names:
            return roughly
        if not self._singles:
            self._singles = {i: self._gradient(i) for i in self.chosen}
            several = {tuple(self.chosen[:n]) for n in self._sizes}
            self._batches = {ids: self.sample.gradient(ids).flat() for ids in several}
        largest = max(float(g.norm() if roughly else g.abs().max()) for g in self._singles.values())
        if largest == 0:  # they tell nothing
            return roughly
        double = next(iter(self.sample.task.named_parameters().values())).dtype is torch.float64
        exact, rough = (1e-8, 1e-5) if double else (2e-4, 1e-2)
        if self.sample.task.tolerance is not None:
            exact = rough = self.sample.task.tolerance[0]
        for ids, found in self._batches.items():
            total = sum(weights[i] for i in ids)
            if not total > 0:
                return False
            mean = torch.stack([self._singles[i] * (weights[i] / total) for i in ids]).sum(0)
            difference = float((mean - found).norm() if roughly else (mean - found).abs().max())
            if not difference <= (rough if roughly else exact) * largest:
                return False
        return True

    def counter(self, keys: Sequence[Key]) -> TokenCounter | None:
        """The first operation whose counts are the weights of the examples; None if there is none."""
        for key in dict.fromkeys(keys):
            if key in self.totals and self.holds(self.totals[key]):
                layouts = [layout for layout in (0, 1, -1) if self._has_layout(key, layout)]
                return TokenCounter(key, layouts[0] if layouts else None)
        return None

    def _has_layout(self, key: Key, layout: int) -> bool:
        """Whether the counts of a batch, split by the layout, are those of its examples alone."""
        for size in self._sizes:
            ids = self.chosen[:size]
            batch = self.sample.task.to_device(self.sample.examples.some(ids))
            seed_for(ids[0])
            with CountWatch(key) as watch:
                self.sample.task(batch)
            found = per_example(watch.found[key], len(ids), layout) if key in watch.found else None
            expected = torch.tensor([self.totals[key][i] for i in ids], dtype=torch.float64)
            if found is None or not torch.allclose(found.cpu(), expected, rtol=1e-6, atol=0.0):
                return False
        return True

    def _most_unlike(self) -> list[int]:
        """Some of the examples, first those with the smallest and the largest counts."""
        extremes: dict[int, None] = {}
        for of in self.totals.values():
            known = sorted(self.ids, key=lambda i, of=of: of[i])  # type: ignore[misc]
            if of[known[0]] < of[known[-1]]:
                extremes |= dict.fromkeys((known[0], known[-1]))
        step = max(1, len(self.ids) // _COMPARED)
        return list(dict.fromkeys([*list(extremes)[: _COMPARED - 2], *self.ids[::step], *self.ids]))[:_COMPARED]

    def _gradient(self, example: int) -> Tensor:
        found = self.sample.alone(example, gradient=True).gradient
        assert found is not None
        return found.flat()
