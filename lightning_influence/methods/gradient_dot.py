"""Gradient dot: do a training example and a query pull the final weights the same way? (Charpiat et al., 2019)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_influence.methods.kinds import TransformedProduct
from lightning_influence.methods.method import Evidence
from lightning_influence.numerics.projections import RandomProjection


@dataclass(frozen=True)
class GradientDot(TransformedProduct):
    r"""Inner product of loss gradients at the final weights: the cheapest baseline.

    .. math:: s(q, z) = \nabla\ell(w, q) \cdot \nabla\ell(w, z)

    Source: Charpiat, Girard, Felardos, Tarabalka. Input Similarity from the Neural Network Perspective. NeurIPS 2019.
    Needs: the final weights.
    Units: arbitrary.
    Cost: one backward pass an example.

    Args:
        normalize: ``"cosine"`` for the angle alone, ``"layerwise"`` for the sum of the angles within each layer.
        projection: multiply random projections of the gradients instead: the same on average.

    Raises:
        ValueError: another ``normalize``; self-influence of a normalised method, which is constant.
    """

    normalize: Literal["cosine", "layerwise"] | None = None
    projection: RandomProjection | None = None
    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS
