"""The dense Hessian of the training loss."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_influence.curvature.exact import Exact
from lightning_influence.gradients.products import Matrix


@dataclass(frozen=True)
class ExactHessian(Exact):
    """The dense Hessian of a small model, inverted exactly: the influence function's own definition.

    Away from a minimum it has negative eigenvalues and the scores lose their meaning, which the notes then say:
    ``ExactGGN`` does not.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017.
    """

    kind: ClassVar[str] = "Hessian"
    matrix: ClassVar[Matrix] = "hessian"
