"""The dense Gauss-Newton matrix: the Hessian without the second derivatives of the network itself."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_influence.curvature.exact import Exact
from lightning_influence.gradients.products import Matrix


@dataclass(frozen=True)
class ExactGGN(Exact):
    r"""The dense Gauss-Newton matrix of a small model, inverted exactly.

    .. math:: G = \frac{1}{n} \sum_i J_i^\top S_i J_i

    with J the derivative of the network's outputs by the parameters and S the Hessian of the loss by the outputs: what
    enters the loss function, or, where none of ``torch.nn.functional`` is called, what the last layer gives. Positive
    semi-definite for a loss that is convex in them, and equal to the Hessian where the outputs are linear.

    Source: Schraudolph. Fast Curvature Matrix-Vector Products. Neural Computation 2002.
    """

    kind: ClassVar[str] = "GGN"
    matrix: ClassVar[Matrix] = "ggn"
