"""What methods do to both sides of an inner product of gradients before they meet: one length, a projection."""

from typing import TypeVar

from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.projections import Projector, RandomProjection

Side = TypeVar("Side", Gradients, QueryGradients)


class Transforms:
    """What is done to queries and training examples alike.

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
