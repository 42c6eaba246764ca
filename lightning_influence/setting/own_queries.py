"""Training examples as the queries of a replay, for self-influence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.products import Flat
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.setting.setting import Setting


@dataclass(frozen=True, eq=False)
class ExampleQueries:
    """Some training examples as queries.

    Args:
        setting: the question.
        ids: of the examples.
    """

    setting: Setting
    ids: Sequence[int]

    def gradients(self) -> QueryGradients:
        """Their gradients at the weights that are loaded now."""
        return EachQuery([gradients for _, gradients in gradients_of(self.setting, self.ids)])

    def own(self, found: Tensor) -> Tensor:
        """[example]: of what was found for the queries, [query, train], each query's with itself."""
        return found[torch.arange(len(self.ids)), torch.as_tensor(self.ids).to(found.device)]


@dataclass(frozen=True, eq=False)
class EntryQueries:
    """Unit vectors in place of gradients: what is linear in a query's gradient follows for every example.

    Args:
        setting: the question.
        ids: of the examples.
        entries: which entries of all parameters, one after another.
    """

    setting: Setting
    ids: Sequence[int]
    entries: range

    @property
    def _flat(self) -> Flat:
        parameters = self.setting.engine.task.named_parameters(self.setting.engine.plan.names)
        return Flat({name: p.shape for name, p in parameters.items()})

    def gradients(self) -> QueryGradients:
        """The unit vectors."""
        flat = self._flat
        units = self.setting.zeros().new_zeros(len(self.entries), len(flat))
        units[torch.arange(len(self.entries)), torch.as_tensor(self.entries)] = 1.0
        return DenseQueries(flat.split(units), self.setting.engine.groups)

    def own(self, found: Tensor) -> Tensor:
        """[example]: of what was found for the unit vectors, [entry, train], sums weighted by each own gradient."""
        self.setting.final()
        flat, values = self._flat, []
        for ids, gradients in gradients_of(self.setting, self.ids):
            rows = flat.join(gradients.dense(), len(ids), found)[:, self.entries.start : self.entries.stop]
            values.append(torch.linalg.vecdot(rows.to(found), found[:, torch.as_tensor(ids).to(found.device)].T))
        return torch.cat(values)


def gradients_of(setting: Setting, ids: Sequence[int]) -> Iterator[tuple[Sequence[int], Gradients]]:
    """Gradients of any training examples at the weights that are loaded now, in blocks."""
    examples = setting.examples
    for start in range(0, len(ids), examples.block_size):
        some = ids[start : start + examples.block_size]
        yield some, setting.engine.gradients(examples.chosen(some), again=examples.chosen)
    setting.engine.read_checks()
