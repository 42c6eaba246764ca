"""How strongly the training examples of a question were trained on."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from lightning_influence.setting.setting import Setting


def exposure_before(setting: "Setting", index: int, reduction: Literal["mean", "sum"] | None = None) -> Tensor:
    """[group, train]: how strongly each example was trained on before a checkpoint, see ``Trajectory.exposure``.

    Where the batch order is not known, this is an expectation, which is noted.

    Args:
        setting: the question.
        index: position of the checkpoint.
        reduction: of the loss; None: the step's own.
    """
    trajectory = setting.trajectory
    assert trajectory is not None
    draws = None
    if not trajectory.has_batch_order:
        draws = setting.draws()
        setting.note("The batch order is not known: each example is given its expected share of the steps.")
        if draws is not None and draws.note is not None:
            setting.note(draws.note)
    about = setting.n_train, setting.batches_per_epoch, setting.engine.weights, draws
    return trajectory.exposure(index, reduction or setting.engine.reduction.coefficient(), *about)
