"""How long products with a curvature take, and how many of them a solver needs."""

from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.gradients.queries import EachQuery, QueryGradients
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# Vectors that are multiplied at once for an estimate.
_TIMED = 8


@dataclass(frozen=True)
class ProductTimes:
    """Seconds of products with a curvature of all training examples, by those of a block.

    Args:
        setting: of the question.
        matrix: the curvature.
    """

    setting: Setting
    matrix: Matrix

    @classmethod
    def at(cls, setting: Setting, matrix: Matrix) -> "ProductTimes":
        """Those of a question, which are measured once."""
        return setting.state(("product times", matrix), cls, setting, matrix)

    def of(self, vectors: float) -> float:
        """One product with so many vectors at once."""
        one, more = self._measured
        each = max(0.0, (more - one) / (_TIMED - 1))
        return one + each * (vectors - 1)

    @cached_property
    def _measured(self) -> tuple[float, float]:
        """With one vector, and with a few at once."""
        setting, block = self.setting, Samples.of(self.setting).block
        products = Products(setting.engine, setting.examples.first(block.size))  # in one block, as all are
        share = setting.n_train / block.size

        def seconds(vectors: int) -> float:
            some = torch.ones(vectors, len(products.flat)).to(products.like)
            return timed(lambda: products.times(self.matrix, some)) * share

        return seconds(1), seconds(_TIMED)


def some_queries(setting: Setting, count: int) -> QueryGradients:
    """A few of the queries' gradients, or without queries those of the first training examples."""
    if setting.queries is not None:
        return setting.queries[:count].gradients()
    block = Samples.of(setting).block
    some = setting.engine.gradients(setting.examples.chosen(list(block.ids)[:count]), checked=False)
    return EachQuery([some])
