"""Steps that are known from Lightning's ``.ckpt`` files: of each optimizer, and the exposure that they stand for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.trajectory.exposure import Reduction
from lightning_influence.trajectory.parameter_groups import gain

if TYPE_CHECKING:
    from lightning_influence.trajectory.trajectory import Trajectory


def count_optimizers(contents: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is added to the optimizer options, and notes.

    Args:
        contents: of Lightning's ``.ckpt`` files.

    Returns:
        ``optimizers``: by how many ``global_step`` is divided; ``uncounted``: whether that is a guess.
    """
    count = max((len(content.get("optimizer_states") or ()) for content in contents), default=0)
    if count < 2:
        return {}, []
    for content in contents:
        progress = ((content.get("loops") or {}).get("fit_loop") or {}).get("epoch_loop.batch_progress") or {}
        if content["global_step"] != count * (progress.get("total") or {}).get("ready", -1):
            note = (
                f"The files have the steps of {count} optimizers together, not of each: each is taken to have made as "
                "many, so that the scores' units are arbitrary."
            )
            return {"optimizers": count, "uncounted": True}, [note]
    return {"optimizers": count}, [f"Each of the {count} optimizers made one step in each batch."]


def expected_from_files(
    trajectory: "Trajectory", index: int, reduction: Reduction, n_train: int, batches: int | None
) -> Tensor:
    """[group, train]: the expected exposure of each example between two files, see ``Trajectory.exposure``."""
    after = trajectory.checkpoints[index - 1].step if index else 0
    steps = (trajectory.checkpoints[index].step - after) / trajectory.settings[0].get("optimizers", 1)
    rates = torch.tensor(trajectory.learning_rates(index), dtype=torch.float64)
    if len(trajectory.checkpoints) == 1 and steps == 0:
        return torch.full((trajectory.n_groups, n_train), 1.0 / n_train, dtype=torch.float64)
    if reduction == "sum" and batches is None:
        raise ValueError(
            "Expected the number of batches per epoch for a loss that sums over its batch, where no batch order is"
            " known, got None. Pass the training DataLoader as `Attributor(train=)`, or `batches_per_epoch=` to"
            " `Trajectory.exposure`."
        )
    gains = torch.tensor([gain(group) for group in trajectory.settings[0]["groups"]], dtype=torch.float64)
    visits = steps / (n_train if reduction == "mean" else batches)  # type: ignore[operator]
    return (rates * gains * visits)[:, None].repeat(1, n_train)
