"""Layer rules, one file per kind of operation: how to compute the per-sample gradients of its parameters."""

from lightning_influence.gradients.rules.convolution import CONVOLUTIONS
from lightning_influence.gradients.rules.einsum import EINSUM
from lightning_influence.gradients.rules.elementwise import ELEMENTWISE
from lightning_influence.gradients.rules.embedding import EMBEDDINGS
from lightning_influence.gradients.rules.linear import LINEAR
from lightning_influence.gradients.rules.normalization import NORMALIZATIONS
from lightning_influence.gradients.rules.rule import LayerRule, Operands

RULES = LINEAR | CONVOLUTIONS | EMBEDDINGS | EINSUM | NORMALIZATIONS | ELEMENTWISE

__all__ = ["RULES", "LayerRule", "Operands"]
