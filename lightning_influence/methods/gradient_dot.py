"""Gradient dot: do a training example and a query pull the final weights the same way? (Charpiat et al., 2019)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.method import Evidence, Method, one_of
from lightning_influence.numerics.projections import Projector, RandomProjection
from lightning_influence.setting import Queries, Setting

Side = TypeVar("Side", Gradients, QueryGradients)


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
        sides = Sides(self.normalize, self.projection)
        query = sides(stage.gradients(queries))
        for columns, block in stage.train():
            total[:, columns] += query.dot(sides(block))
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: squared length of each example's gradient."""
        refuse_constant(self.normalize)
        total, sides = setting.zeros(), Sides(None, self.projection)
        for columns, block in setting.final().train():
            total[columns] += sides(block).norm2()
        return total


class Sides:
    """What is done to both sides of an inner product of gradients before they meet.

    Args:
        normalize: a method's setting of that name.
        projection: likewise; one object for a whole score draws each matrix once.
    """

    def __init__(self, normalize: str | None, projection: RandomProjection | None) -> None:
        self.normalize = normalize
        self._projector = None if projection is None else Projector(projection)

    def __call__(self, gradients: Side) -> Side:
        """At length one first, where asked for: the projected products are then those of the angles on average."""
        if self.normalize is not None:
            gradients = gradients.normalized(self.normalize)
        return gradients if self._projector is None else gradients.project(self._projector)


def check_projection(projection: object) -> None:
    """Raises TypeError for what is no projection."""
    if projection is not None and not isinstance(projection, RandomProjection):
        raise TypeError(
            f"Expected `projection` to be a RandomProjection or None, got {projection!r}. Pass "
            "`projection=RandomProjection(256)`."
        )


def refuse_constant(normalize: str | None) -> None:
    """Raises where every example's self-influence would be the same."""
    if normalize is not None:
        raise ValueError(
            f"Expected `normalize=None` for self-influence, got {normalize!r}: gradients of length one all have the "
            "same product with themselves. Leave `normalize` out."
        )
