"""What methods apply to both gradients of an inner product: normalisation and random projection."""

from typing import TypeVar

from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.projections import Projector, RandomProjection

Side = TypeVar("Side", Gradients, QueryGradients)


class Transforms:
    """Normalises and projects the gradients of queries and of training examples in the same way.

    Use one object for all gradients of a score, so that each projection matrix is drawn once.

    Args:
        normalize: ``"cosine"``, ``"layerwise"`` or None; see ``Gradients.normalized``.
        projection: the random projection, or None.
    """

    def __init__(self, normalize: str | None, projection: RandomProjection | None) -> None:
        self.normalize = normalize
        self._projector = None if projection is None else Projector(projection)

    def __call__(self, gradients: Side) -> Side:
        """Normalise first, then project, so that products of projections are cosines in expectation."""
        if self.normalize is not None:
            gradients = gradients.normalized(self.normalize)
        return gradients if self._projector is None else gradients.project(self._projector)


def check_projection(projection: object) -> None:
    """Raise TypeError unless this is a RandomProjection or None."""
    if projection is not None and not isinstance(projection, RandomProjection):
        raise TypeError(
            f"Expected `projection` to be a RandomProjection or None, got {projection!r}. Pass "
            "`projection=RandomProjection(256)`."
        )


class ConstantSelfInfluenceError(ValueError):
    """All examples have the same self-influence, which therefore says nothing."""


_SCALES = {
    "cosine": "Scores are cosines of the angle between two gradients, from -1 (opposite) to 1 (the same direction)",
    "layerwise": "Scores are sums over layers of the cosines between two gradients, each from -1 to 1",
}


def scale(normalize: str, weighted: bool) -> str:
    """What scores of normalised gradients are; weighted ones are summed with learning rates as weights."""
    summed = ", summed over training with the learning rates as weights" if weighted else ""
    return f"{_SCALES[normalize]}{summed}; the size of a gradient does not count."


def refuse_constant(normalize: str | None) -> None:
    """Raise ``ConstantSelfInfluenceError`` with ``normalize=``."""
    if normalize is not None:
        raise ConstantSelfInfluenceError(
            f"Expected `normalize=None` for self-influence, got {normalize!r}, with which it is the same for all "
            "examples. Leave `normalize` out."
        )
