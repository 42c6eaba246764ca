"""Scores in units of loss that are larger than any change of a loss can be."""

import math

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.losses import Losses
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Method
from lightning_influence.setting.setting import Setting

# A choice, far above what leaving out one example changes a loss by.
_IMPOSSIBLE = 100.0
# Examples whose own losses are computed, where their scores are suspicious.
_LOOKED_AT = 16
FLAG = "score_over_loss"
"""The diagnostic that only such scores have."""


def note_impossible(method: Method, setting: Setting, engine: Engine, examples: Examples, largest: Tensor) -> None:
    """Note scores that exceed the losses of the fit, and those of the same example, by two orders of magnitude.

    Only where some exceed the recorded losses of the fit are examples computed: at the first and last checkpoint.

    Args:
        method: the scores are of.
        setting: the question, which takes the note.
        engine: computes the losses of the examples.
        examples: the queries, or the training examples for self-influence.
        largest: the magnitude of each example's largest score, [example].
    """
    known = _recorded(setting)
    if isinstance(method, ForwardOnly) or not known or engine.task.loss is not None or not len(largest):
        return
    if not method.unit(setting).startswith("loss"):
        return
    size, worst = (found.cpu() for found in largest.nan_to_num(0.0).topk(min(_LOOKED_AT, len(largest))))
    worst, size = worst[size > _IMPOSSIBLE * known], size[size > _IMPOSSIBLE * known].double()
    if not len(worst):
        return
    losses_of, least = Losses(), torch.full((len(worst),), known, dtype=torch.float64)
    assert setting.trajectory is not None
    block = examples.chosen(sorted(worst.tolist()))
    for _ in setting.stages([0, len(setting.trajectory.checkpoints) - 1]):
        least = torch.maximum(least, losses_of(engine, block).abs().cpu()[worst.argsort().argsort()])
    over = float((size / least).nan_to_num(0.0).max())
    if over > _IMPOSSIBLE:
        setting.diagnostic(FLAG, over)
        setting.note(
            f"The unit of the scores is arbitrary: some are {over:.2g} times as large as the loss of their example or "
            "any that the fit recorded, as no change of a loss is. Something is divided by almost nothing, such as an "
            "eigenvalue without `damping=`, or grows exponentially with a negative one. Their order is doubtful as "
            "well: compare it with that of another method or with `LeaveOneOut()`"
        )


def _recorded(setting: Setting) -> float:
    """The largest loss that the fit recorded; 0 if it recorded none."""
    data = None if setting.trajectory is None else setting.trajectory.fit_data
    losses = () if data is None or data.losses is None else data.losses.values
    return max((abs(value) for *_, value in losses if math.isfinite(value)), default=0.0)
