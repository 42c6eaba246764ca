"""Scores by replaying a captured fit, what they cost, and how far they can be trusted."""

import time
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.replay.adjoint import Walk, adjoint
from lightning_influence.replay.leave_out import without
from lightning_influence.replay.refit_agreement import Refits, removals
from lightning_influence.replay.replay import MAX_DRIFT, Replay
from lightning_influence.replay.steps import Step, examples_of
from lightning_influence.setting.setting import Queries, Setting

# Scores of a smooth fit agree by 0.9 and more with refits, those of a rough one by 0.5.
_AGREEING = 0.8
# Vectors of the model's size that a query has at once: by weight and state, their successors, and in the products.
_VECTORS = 8
_QUERY_BYTES = 2**29


@dataclass(frozen=True)
class Replayed:
    """How a method replays.

    Args:
        hessian: whether a change of the weights changes the gradients after it.
        removal: ``"downweight"`` leaves the divisor of a batch, ``"renormalize"`` divides by the sum of the weights.
        max_drift: how far the replay may stray from the captured weights, relative to the distance they moved.
        runs: 1: the derivative at the fit itself; more: the mean of derivatives at so many fits, each without a random
            tenth of the examples.
        checks: refits without some examples that scores are held against.
    """

    hessian: bool = True
    removal: str = "downweight"
    max_drift: float = MAX_DRIFT
    runs: int = 1
    checks: int = 4

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]: minus the derivative of each query's final loss by each example's weight."""
        replay = self.replay(setting)
        total = self.runs * sum(examples_of(segment.steps) for segment in replay.segments)
        told = ReplayProgress(setting, total)
        if self.runs == 1:
            setting.final()
            final = queries.gradients().dense()
            scores = -adjoint(replay, final, self.hessian, self.removal == "renormalize", told)
        else:
            scores = -self._mean(setting, replay, queries, told)
        if self.removal == "renormalize" and not replay.forward.mean:
            setting.note("`removal='renormalize'` is `'downweight'` here: the loss is a sum and divides by nothing.")
        told.rest()
        tell_drift(setting, replay)
        if self.checks:
            self._tell_agreement(setting, replay, scores, queries)
        return scores.to(setting.zeros().dtype)

    def _mean(self, setting: Setting, replay: Replay, queries: Queries, told: "ReplayProgress") -> Tensor:
        """[query, train]: derivatives at the ends of fits without some examples."""
        task, total = setting.engine.task, None
        replay.run()  # is this the fit?
        for weights in removals(len(replay.examples), self.runs, seed=1):
            part = without(replay, weights == 0)
            setting.final()
            part.run().put_into(task)
            found = adjoint(part, queries.gradients().dense(), self.hessian, done=told)
            total = found if total is None else total + found
        assert total is not None
        return total / self.runs

    def replay(self, setting: Setting) -> Replay:
        """The fit that the setting was captured from, once a question."""
        return setting.once(
            ("replay", self.max_drift),
            lambda: Replay(setting.engine, setting.examples, setting.trajectory, self.max_drift),
        )

    def _tell_agreement(self, setting: Setting, replay: Replay, scores: Tensor, queries: Queries) -> None:
        """How far the derivative of this fit can be trusted."""
        weights, renormalize = removals(len(replay.examples), self.checks), self.removal == "renormalize"
        refits = setting.once((self, "refits"), lambda: Refits(replay, weights, renormalize))
        value = refits.agreement(scores, queries)
        setting.figure("agreement", value, min)
        if not value >= _AGREEING:
            setting.note(
                f"Agreement is {value:.2f}, below {_AGREEING}: in {self.checks} refits of this very fit, each without "
                "a random tenth of the examples, the queries' losses did not change as the scores foresee. What really "
                "happens without an example may differ from its score. `HyDRA(runs=20)` foresees such removals better; "
                "larger batches, a lower learning rate or smoother activations make a fit easier to foresee; averages "
                "over seeds are better told by `InfluenceFunction` or `SOURCE`."
            )

    def at_once(self, setting: Setting) -> int:
        """How many queries may be walked back together."""
        return max(1, _QUERY_BYTES // max(1, _VECTORS * setting.engine.vector_bytes))

    def seconds(self, setting: Setting, queries: Queries) -> float:
        """What the queries will take together, by timing a few steps forward and one back."""
        replay = self.replay(setting)
        setting.final()
        final = queries.gradients().dense()
        walk = Walk(replay, final, self.hessian, False)
        segment = next(s for s in reversed(range(len(replay.segments))) if replay.segments[s].steps)
        with replay.training():
            here = replay.start(segment)
            steps = replay.segments[segment].steps[:3]
            list(replay.walk(here, steps[:1], separate=True))
            started = time.perf_counter()
            moment = list(replay.walk(here, steps))[-1]
            forward = (time.perf_counter() - started) / len(steps)
            replay.stand(moment)
            started = time.perf_counter()
            walk.back(moment)
            backward = time.perf_counter() - started
        again = 1 if self.runs == 1 else 2 * self.runs
        return len(replay.steps) * (forward * (again + self.checks) + backward * self.runs)


class ReplayProgress:
    """Says how far a walk is, in training examples of the tile."""

    def __init__(self, setting: Setting, total: int) -> None:
        self._setting, self._total = setting, max(1, total)
        self._seen = self._told = 0

    def __call__(self, step: Step) -> None:
        """One more step."""
        self._seen += examples_of([step])
        now = len(self._setting.ids) * min(self._seen, self._total) // self._total
        self._setting.on_block(now - self._told)
        self._told = now

    def rest(self) -> None:
        """All of it."""
        self._setting.on_block(len(self._setting.ids) - self._told)


def tell_drift(setting: Setting, replay: Replay) -> None:
    """What the replay missed of the captured weights."""
    setting.figure("drift", replay.drift)
    if (gap := replay.forward.attention) is not None:
        setting.figure("attention_drift", gap)
        setting.note(
            "Attention, which ran in a fused kernel, is replayed in the math kernel, which has second derivatives: "
            f"gradients of one step differ by {gap:.1e} of their length."
        )
    if replay.beyond_rounding():
        worst = max(replay.drifts, key=lambda step: replay.drifts[step])
        setting.note(
            f"The replay strayed from the captured weights by up to {replay.drift:.1e} (step {worst}) of the distance "
            f"that they moved between checkpoints, which is more than rounding. {replay.cause()}"
        )
