"""GradientDot: inner product of the gradients of a query and a training example (Charpiat et al., 2019)."""

from dataclasses import dataclass
from typing import Literal

from lightning_influence.methods.kinds import TransformedProduct
from lightning_influence.numerics.projections import RandomProjection


@dataclass(frozen=True)
class GradientDot(TransformedProduct):
    r"""Inner product of loss gradients at the final weights; the cheapest baseline.

    It is positive if one small gradient step on the training example lowers the query's loss.

    .. math:: s(q, z) = \nabla\ell(w, q) \cdot \nabla\ell(w, z)

    Source: Charpiat, Girard, Felardos, Tarabalka. Input Similarity from the Neural Network Perspective. NeurIPS 2019.
    Needs: the final weights.
    Units: arbitrary.
    Cost: one backward pass per example.

    Args:
        normalize: ``"cosine"``: the cosine of the angle between the gradients; ``"layerwise"``: the sum of all layers'
            cosines; None: the plain inner product.
        projection: multiply random projections of the gradients, which gives the same scores on average.

    Raises:
        ValueError: another value; self-influence with ``normalize``, which is the same for all examples.
    """

    normalize: Literal["cosine", "layerwise"] | None = None
    projection: RandomProjection | None = None
