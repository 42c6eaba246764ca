"""TracInCP: the loss decrease of a query, traced through checkpoints (Pruthi et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.methods.kinds import TransformedProduct
from lightning_influence.methods.method import Evidence
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.setting.setting import Setting, Stage


@dataclass(frozen=True)
class TracInCP(TransformedProduct):
    r"""How much each training example lowered a query's loss at the moments it was seen, at a few checkpoints.

    .. math:: s(q, z_i) = \sum_k c_{ki} \, \nabla\ell(w_k, q) \cdot \nabla\ell(w_k, z_i)

    With ``units="loss"``, c is the sum of learning rate × weight in the batch / (1 - momentum) over the steps since the
    checkpoint before in which example i was drawn. With ``units="paper"`` it is the learning rate at the checkpoint.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020. ``normalize="cosine"`` is GAS, ``"layerwise"`` GAS-L of Hammoudeh and Lowd, Identifying a
    Training-Set Attack's Target Using Renormalized Influence Estimation. CCS 2022.
    Needs: checkpoints with learning rates.
    Units: query loss, counted when the example was seen (not what remains of it at the end); arbitrary where gradients
    are normalised or the optimizer rescales them.
    Cost: one backward pass an example and checkpoint.
    Departs from the paper: the coefficient, unless ``units="paper"``.

    Args:
        units: ``"loss"`` or ``"paper"``.
        normalize: None, ``"cosine"`` or ``"layerwise"``.
        checkpoints: positions among the trajectory's checkpoints (negative from the end); None: all but the initial.
        projection: multiply random projections of the gradients instead: the same on average.

    Raises:
        ValueError: other values; self-influence of a normalised method, which is constant.
    """

    units: Literal["loss", "paper"] = "loss"
    normalize: Literal["cosine", "layerwise"] | None = None
    checkpoints: tuple[int, ...] | None = None
    projection: RandomProjection | None = None
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("units", self.units, ("loss", "paper"))

    def weight(self, stage: Stage) -> Tensor:
        """[group, train]: exposure, or the learning rate at the checkpoint for all alike."""
        if self.units == "paper":
            return stage.learning_rates[:, None].expand_as(stage.exposure)
        return stage.exposure

    def unit(self, setting: Setting) -> str:
        """Loss, unless something took the scale away."""
        adaptive = setting.trajectory is not None and setting.trajectory.adaptive
        if self.normalize or self.units == "paper" or adaptive:
            return "arbitrary"
        return "loss (summed over the moments the example was seen)"
