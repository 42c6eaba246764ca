"""What working with a curvature takes: how many vectors fit at once, and how long products with it last."""

import torch

from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# Bytes of vectors that are held at once.
_BYTES = 2**29
# So many products are timed for an estimate.
_TIMED = 8


def at_once(setting: Setting, copies: int = 1) -> int:
    """How many vectors of all parameters fit half a GiB, so many copies of each."""
    return max(1, _BYTES // max(1, copies * setting.engine.vector_bytes))


def seconds_of_products(setting: Setting, matrix: Matrix, count: int) -> float:
    """Of the curvature with so many vectors, by timing a few with some of the training examples."""
    products = Products(setting.engine, setting.examples)
    ids = range(min(setting.n_train, setting.examples.block_size))
    few = torch.ones(min(count, _TIMED), len(products.flat)).to(products.like)
    return timed(lambda: products.times(matrix, few, ids)) / len(few) * count * setting.n_train / len(ids)
