"""The dense Hessian of the training loss."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_influence.curvature.exact import Exact
from lightning_influence.gradients.products import Matrix


@dataclass(frozen=True)
class ExactHessian(Exact):
    r"""The dense Hessian of a small model, inverted exactly, as in the definition of influence functions.

    .. math:: H = \frac{1}{n} \sum_i \nabla^2 \ell_i

    Away from a minimum it has negative eigenvalues, and scores that divide by them mean little; the notes report this.
    ``ExactGGN`` has no negative eigenvalues for the usual losses.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017.
    Cost: one product with H per parameter (about three passes over the training data each) and one factorisation,
    once. Memory grows with the square of the number of parameters, time with its cube.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        max_parameters: a model with more parameters is refused.

    Raises:
        ValueError: the model has too many parameters, or the matrix is singular with this damping.
    """

    kind: ClassVar[str] = "Hessian"
    matrix: ClassVar[Matrix] = "hessian"
