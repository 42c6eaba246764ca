"""Gradient dot: do a training example and a query pull the final weights the same way? (Charpiat et al., 2019)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.gradients.transforms import Transforms, check_projection, refuse_constant
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.setting.setting import Queries, Setting


@dataclass(frozen=True)
class GradientDot(Method):
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

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, (None, "cosine", "layerwise"))
        check_projection(self.projection)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        total, stage = setting.zeros(queries), setting.final()
        sides = Transforms(self.normalize, self.projection)
        query = sides(stage.gradients(queries))
        for columns, block in stage.train():
            total[:, columns] += query.dot(sides(block))
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: squared length of each example's gradient."""
        refuse_constant(self.normalize)
        total, sides = setting.zeros(), Transforms(None, self.projection)
        for columns, block in setting.final().train():
            total[columns] += sides(block).norm2()
        return total
