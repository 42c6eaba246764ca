"""How long products with a curvature take."""

import torch

from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# The most products that are timed for an estimate.
_TIMED = 8


def seconds_of_products(setting: Setting, matrix: Matrix, count: int) -> float:
    """Estimate the seconds of multiplying ``count`` vectors, by timing a few on some of the training examples."""
    products = Products(setting.engine, setting.examples)
    ids = range(min(setting.n_train, setting.examples.block_size))
    few = torch.ones(min(count, _TIMED), len(products.flat)).to(products.like)
    return timed(lambda: products.times(matrix, few, ids)) / len(few) * count * setting.n_train / len(ids)
