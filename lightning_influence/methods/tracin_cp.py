"""TracInCP: how training on an example lowered a query's loss, by gradients at checkpoints (Pruthi et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_influence.checks import check_not_empty, one_of
from lightning_influence.methods.kinds import TransformedProduct
from lightning_influence.methods.method import Evidence
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.setting.batch_index import note_clock
from lightning_influence.setting.setting import Setting, Stage


@dataclass(frozen=True)
class TracInCP(TransformedProduct):
    r"""How much training on each example lowered a query's loss, by gradients at a few checkpoints.

    .. math:: s(q, z_i) = \sum_k c_{ki} \, \nabla\ell(w_k, q) \cdot \nabla\ell(w_k, z_i)

    With ``units="loss"``, c is the sum of learning rate × weight in the batch / (1 - momentum) over the steps since the
    previous checkpoint that had example i in their batch. With ``units="paper"``, c is the checkpoint's learning rate.
    Where the loss depends on ``batch_idx``, an example's gradient is taken at the index of each of these steps.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020. ``normalize="cosine"`` is GAS, ``"layerwise"`` GAS-L of Hammoudeh and Lowd, Identifying a
    Training-Set Attack's Target Using Renormalized Influence Estimation. CCS 2022.
    Needs: checkpoints with learning rates.
    Units: query loss, summed over the steps with the example (later steps may undo such a decrease); arbitrary if
    gradients are normalised or the optimizer rescales them.
    Cost: one backward pass per example and checkpoint.
    Departs from the paper: the coefficient c, unless ``units="paper"``.

    Under a squared error, early checkpoints with their large residuals outweigh the later ones: predicting 60 refits of
    an MLP on concrete's strength (LDS), all 15 checkpoints reached 0.25, the first five 0.12, the last five 0.34
    (``checkpoints=(-5, -4, -3, -2, -1)``), and ``InfluenceFunction(EKFAC())`` 0.45.

    Args:
        units: ``"loss"`` or ``"paper"``, which decides c.
        normalize: ``"cosine"``: the cosine of the angle between the gradients; ``"layerwise"``: the sum of all layers'
            cosines; None: the plain inner product.
        checkpoints: positions in the trajectory (negative ones count from the end); None: all but the initial weights.
        projection: multiply random projections of the gradients, which gives the same scores on average.

    Raises:
        ValueError: other values; self-influence with ``normalize``, which is the same for all examples.
    """

    units: Literal["loss", "paper"] = "loss"
    normalize: Literal["cosine", "layerwise"] | None = None
    checkpoints: tuple[int, ...] | None = None
    projection: RandomProjection | None = None
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("units", self.units, ("loss", "paper"))
        check_not_empty("checkpoints", self.checkpoints)

    def weight(self, stage: Stage) -> Tensor:
        """The exposure, or the learning rate at the checkpoint for all examples, [group, train]."""
        if stage.position == self.positions(stage.setting.trajectory)[0]:
            note_clock(stage)
        return stage.exposure if self.units == "loss" else stage.learning_rates[:, None].expand_as(stage.exposure)

    def follows_batch_index(self) -> bool:
        """With ``units="loss"``: the coefficient is a sum over steps, each of which has an index."""
        return self.units == "loss"

    def unit(self, setting: Setting) -> str:
        """Loss; arbitrary with ``normalize``, ``units="paper"`` or an adaptive optimizer."""
        unknown = setting.trajectory is not None and (
            setting.trajectory.adaptive or not setting.trajectory.counts_steps
        )
        arbitrary = self.normalize or self.units == "paper" or unknown
        return "arbitrary" if arbitrary else "loss (summed over the steps with the example)"
