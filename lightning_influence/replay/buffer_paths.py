"""Refuses derivatives of fits in which buffers carry the weights from one step to the losses after it."""

from torch import Tensor

from lightning_influence.module.buffer_paths import candidates, carrying, is_due, refusal, running_statistics
from lightning_influence.replay.replay import Replay, ReplayedStep
from lightning_influence.setting.setting import Setting
from lightning_influence.wording import counted


class BufferPaths:
    """Looks at the steps of a replay until each buffer that moved during the fit was seen to be written, then at fewer.

    A fit without such buffers costs nothing.

    Args:
        replay: the fit.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay, self._steps = replay, 0
        start, end = replay.start().buffers, replay.end().buffers
        self._moved = {name for name in candidates(replay.engine.task) if _moved(start.get(name), end.get(name))}
        self._unseen = set(self._moved)

    def check(self, moment: ReplayedStep) -> None:
        """Looks at a step, whose state is loaded, and loads that again.

        Raises:
            ValueError: the derivatives would lack what the weights change through a buffer.
        """
        if not self._moved or not moment.step.batches:
            return
        self._steps += 1
        if not self._unseen and not is_due(self._steps):
            return
        replay, batch = self._replay, moment.step.batches[0]
        data = replay.forward.read(batch)
        written, name = carrying(
            replay.engine.task, self._moved, replay.trained, lambda: replay.forward.losses(batch, data)
        )
        if name is not None:
            raise ValueError(refusal(name))
        self._unseen -= written
        replay.load(moment.before, moment.step)


def note_statistics(setting: Setting) -> None:
    """Says which layers' running statistics the derivatives take as constants."""
    still = () if setting.trajectory is None else setting.trajectory.eval_modules
    names = [name for name in running_statistics(setting.task.module) if name not in still]
    if names:
        more = f" and {counted(len(names) - 1, 'more layer')}" if len(names) > 1 else ""
        setting.note(
            f"The running statistics of `{names[0]}`{more} are taken as they were: the scores do not include how an "
            "example changes the queries' losses through them."
        )


def _moved(before: Tensor | None, after: Tensor | None) -> bool:
    return before is not None and after is not None and not bool(((before == after) | before.isnan()).all())
