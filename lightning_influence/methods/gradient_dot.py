"""Gradient dot: do a training example and a query pull the final weights the same way? (Charpiat et al., 2019)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_influence.method import Evidence, Method, one_of
from lightning_influence.setting import Queries, Setting


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

    Raises:
        ValueError: another ``normalize``; self-influence of a normalised method, which is constant.
    """

    normalize: Literal["cosine", "layerwise"] | None = None
    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, (None, "cosine", "layerwise"))

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        total, stage = setting.zeros(queries), setting.final()
        query = stage.gradients(queries)
        query = query.normalized(self.normalize) if self.normalize else query
        for columns, block in stage.train():
            total[:, columns] += query.dot(block.normalized(self.normalize) if self.normalize else block)
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: squared length of each example's gradient."""
        refuse_constant(self.normalize)
        total = setting.zeros()
        for columns, block in setting.final().train():
            total[columns] += block.norm2()
        return total


def refuse_constant(normalize: str | None) -> None:
    """Raises where every example's self-influence would be the same."""
    if normalize is not None:
        raise ValueError(
            f"Expected `normalize=None` for self-influence, got {normalize!r}: gradients of length one all have the "
            "same product with themselves. Leave `normalize` out."
        )
