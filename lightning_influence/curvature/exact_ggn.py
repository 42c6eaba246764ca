"""The dense Gauss-Newton matrix: the Hessian without the second derivatives of the network itself."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_influence.curvature.exact import Exact


@dataclass(frozen=True)
class ExactGGN(Exact):
    r"""The dense Gauss-Newton matrix of a small model, inverted exactly.

    .. math:: G = \frac{1}{n} \sum_i J_i^\top S_i J_i

    with :math:`J_i` the Jacobian of the network's outputs for example i with respect to the parameters, and
    :math:`S_i` the Hessian of its loss with respect to those outputs. The outputs are what is passed to a loss function
    of ``torch.nn.functional``, or those of the last layer if none is called. G is positive semi-definite for a loss
    that is convex in the outputs, and equals the Hessian for outputs that are linear in the parameters.

    Source: Schraudolph. Fast Curvature Matrix-Vector Products. Neural Computation 2002.
    Cost: one product with G per parameter (about three passes over the training data each) and one factorisation,
    once. Memory grows with the square of the number of parameters, time with its cube.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        max_parameters: a model with more parameters is refused.

    Raises:
        ValueError: the model has too many parameters, the matrix is singular with this damping, or the network's
            outputs are not found.
    """

    kind: ClassVar[str] = "GGN"
