"""How far a replay is, and by how much it misses the weights of the fit: what a user is shown of it."""

from lightning_influence.replay.replay import Replay
from lightning_influence.replay.steps import Step, examples_of
from lightning_influence.setting.setting import Setting


class ReplayProgress:
    """Passes the progress of a walk through the fit on, in training examples of the tile.

    Args:
        setting: of the question.
        total: examples, counted at every step that they are in, of the whole walk.
    """

    def __init__(self, setting: Setting, total: int) -> None:
        self._setting, self._total = setting, max(1, total)
        self._seen = self._reported = 0

    def __call__(self, step: Step) -> None:
        """One more step is done."""
        self._seen += examples_of([step])
        now = len(self._setting.ids) * min(self._seen, self._total) // self._total
        self._setting.on_block(now - self._reported)
        self._reported = now

    def finish(self) -> None:
        """The walk is done."""
        self._setting.on_block(len(self._setting.ids) - self._reported)


def note_drift(setting: Setting, replay: Replay) -> None:
    """Reports how far the replayed weights are from the captured ones."""
    setting.diagnostic("drift", replay.drift)
    if (gap := replay.forward.attention) is not None:
        setting.diagnostic("attention_drift", gap)
        setting.note(
            "Attention, which ran in a fused kernel, is repeated in the math kernel, which has second derivatives: "
            f"gradients of one step differ by {gap:.1e} of their length."
        )
    if replay.beyond_rounding():
        worst = max(replay.drifts, key=lambda step: replay.drifts[step])
        setting.note(
            "The training steps, repeated from the record, miss the weights of the fit by up to "
            f"{replay.drift:.1e} (step {worst}) of the distance that those moved between checkpoints, which is more "
            f"than rounding. {replay.cause()}"
        )
