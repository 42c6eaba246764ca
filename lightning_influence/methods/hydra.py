"""HyDRA: derivatives of a query's final loss with respect to training examples' weights (Chen et al., 2021)."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_influence.checks import check_examples, check_integer, check_positive, one_of
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.hints import hinted
from lightning_influence.methods.hydra_during_fit import HyDRADuringFit
from lightning_influence.methods.kinds import WholeRun
from lightning_influence.methods.method import Evidence
from lightning_influence.replay.adjoint import adjoint
from lightning_influence.replay.buffer_paths import note_statistics
from lightning_influence.replay.leave_out import without
from lightning_influence.replay.own_products import own_products
from lightning_influence.replay.progress import ReplayProgress, note_drift
from lightning_influence.replay.refit_agreement import Refits, removals
from lightning_influence.replay.replay import MAX_DRIFT, Replay
from lightning_influence.replay.samples import seconds_of_walk
from lightning_influence.replay.steps import examples_of
from lightning_influence.replay.vectorized import run_many
from lightning_influence.setting.checkpoints import put_in_place
from lightning_influence.setting.own_queries import EntryQueries, ExampleQueries
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import seconds_of
from lightning_influence.wording import counted

# Below this correlation with refits, a note warns. It is 0.9 and more where losses are smooth in the weights of the
# examples, and about 0.5 where they are not.
_AGREEING = 0.8
_ONLY_A_TENTH = (
    "`diagnostics['agreement']` is about refits of this very fit, each without a random tenth of the examples. A high "
    "one does not say that the scores predict what happens without half of them, or with other seeds, which linear "
    "datamodeling scores usually measure: compare methods on that by `metrics.evaluate`."
)
# Memory per query, in vectors of the model's size: derivatives by weights and optimizer state, before and after a step,
# and those inside a product.
_VECTORS = 8
_QUERY_BYTES = 2**29


@dataclass(frozen=True)
class HyDRA(WholeRun):
    r"""How much higher a query's loss would be if this fit were repeated without the example, to first order.

    .. math:: s(q, z_i) = -\nabla\ell(w_T, q) \cdot \frac{d w_T}{d \omega_i}

    with w_T the final weights and ω_i the weight of example i in the training loss. The captured fit is replayed and
    then differentiated backwards step by step, for all examples at once. ``HyDRA.during_fit()`` gives the same scores
    by forward-mode differentiation while the fit runs; it is cheaper for few training examples and many queries.

    Source: Chen, Li, Yu, Wu, Miao. HyDRA: Hypergradient Data Relevance Analysis for Interpreting Deep Neural Networks.
    AAAI 2021. Its derivatives in reverse mode: Ilyas, Engstrom. MAGIC: Near-Optimal Data Attribution for Deep
    Learning. 2025.
    Needs: the batch order, learning rates and checkpoints of a fit by an optimizer that can be replayed.
    Units: query loss, to first order. Where a fit has memorised its examples, leaving one out changes its loss by more:
    exact leave-one-out was up to 30 times the self-influence (measured; nothing detects it here).
    Cost: one replay of the fit, then per query and step about the time of two steps (one without the Hessian), and
    ``checks`` more replays. Self-influence: as with one query per example (or per parameter, where these are fewer);
    without the Hessian, two passes per example and step in all. Memory: weights and optimizer state of the steps
    between two checkpoints, and per query a few vectors of the model's size.
    Departs from the paper: no term of the Hessian is dropped; an example counts at the steps with it (the printed
    algorithm counts it at the others).

    Args:
        mode: ``"during_fit"`` makes ``HyDRA.during_fit()``, for code written for earlier versions.
        hessian: whether a changed weight changes the gradients of later steps; False: the paper's fast approximation,
            in which it does not.
        examples: ids of the training examples that get scores; None: all.
        memory: of ``mode="during_fit"``; see ``HyDRA.during_fit``.
        removal: how an example is left out of a batch: ``"downweight"`` keeps the divisor of the batch's mean loss,
            ``"renormalize"`` divides by the number of examples that remain.
        max_drift: the largest distance of replayed from captured weights, relative to the distance that they moved
            between checkpoints; a larger one is an error.
        runs: 1: the derivative at the fit itself. More: the mean of the derivatives at this many fits, each without a
            random tenth of the examples, for fits where a single derivative predicts removals badly (see ``checks``).
        checks: the number of refits, each without a random tenth of the examples, that the scores are checked with.
            ``Scores.diagnostics["agreement"]`` is the correlation of predicted with true changes of the queries'
            losses, which tells how far to trust the scores about removals of that size from this very fit. Without
            half of the examples, or with other seeds, they may predict far worse: see ``metrics.evaluate``. 0: no
            check.

    Raises:
        ValueError: other values; an optimizer that cannot be replayed; a loss that mixes examples in training (batch
            normalisation) without ``loss=``; with ``hessian``, a buffer that ``training_step`` writes with what depends
            on the weights and that the loss reads (a running centre).
        MissingEvidence: a fit that was not captured step by step.
        DriftError: replayed weights that differ from the captured ones by more than ``max_drift``.
    """

    mode: InitVar[Literal["replay", "during_fit"]] = "replay"
    hessian: bool = True
    examples: tuple[int, ...] | None = None
    memory: InitVar[int] = 2**30
    removal: Literal["downweight", "renormalize"] = "downweight"
    max_drift: float = MAX_DRIFT
    runs: int = 1
    checks: int = 4
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS | Evidence.BATCH_ORDER

    @hinted
    def __new__(
        cls,
        mode: str = "replay",
        hessian: bool = True,
        examples: Sequence[int] | None = None,
        memory: int = 2**30,
        removal: Literal["downweight", "renormalize"] = "downweight",
        max_drift: float = MAX_DRIFT,
        runs: int = 1,
        checks: int = 4,
    ) -> Any:
        """``HyDRA(mode="during_fit", ...)`` returns ``HyDRA.during_fit(...)``."""
        if mode != "during_fit":
            return super().__new__(cls)
        # It raises for bad values.
        cls("replay", hessian, check_examples(examples), memory, removal, max_drift, runs, checks)
        _check_only_replay(mode, removal, runs)
        made = cls.during_fit(hessian, examples, memory)
        object.__setattr__(made, "_of_replay", {"max_drift": max_drift, "checks": checks})
        return made

    def __post_init__(self, mode: str, memory: int) -> None:
        one_of("mode", mode, ("replay", "during_fit"))
        one_of("hessian", self.hessian, (True, False))
        one_of("removal", self.removal, ("downweight", "renormalize"))
        check_positive("max_drift", self.max_drift)
        check_integer("checks", self.checks, least=0)
        if self.checks == 1:
            raise ValueError("Expected `checks` to be 0 or at least 2 refits, got 1.")
        check_integer("runs", self.runs)
        check_integer("memory", memory)
        if self.runs > 1 and self.removal != "downweight":
            _check_only_replay(mode, self.removal, self.runs)
        object.__setattr__(self, "examples", check_examples(self.examples))

    @classmethod
    @hinted
    def during_fit(
        cls, hessian: bool = True, examples: Sequence[int] | None = None, memory: int = 2**30
    ) -> "HyDRADuringFit":
        """The same scores by forward-mode differentiation while the fit runs; see ``HyDRADuringFit``.

        Args:
            hessian: as for ``HyDRA``.
            examples: as for ``HyDRA``.
            memory: bytes of hypergradients in memory; beyond that a file is used.

        Raises:
            ValueError: other values.
        """
        return HyDRADuringFit(hessian, check_examples(examples), memory)

    def scored(self, n_train: int) -> Sequence[int] | None:
        """The given ``examples``."""
        return self.examples

    def hyperparameters(self) -> dict[str, Any]:
        """With the mode, which tells the scores of the two classes apart."""
        return {"mode": "replay"} | super().hyperparameters()

    def unit(self, setting: Setting) -> str:
        """Loss, since the scores are predicted differences of losses."""
        return "loss"

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Minus the derivative of each query's final loss by each example's weight, [query, train]."""
        replay = self._replay(setting)
        progress = ReplayProgress(setting, self.runs * examples_of(replay.steps))
        scores = -self._derivatives(setting, replay, queries.gradients, progress)
        progress.finish()
        self._note(setting, replay)
        if self.checks:
            self._note_agreement(setting, replay, scores, queries)
        return scores.to(setting.zeros().dtype)

    def self_influence(self, setting: Setting) -> Tensor:
        """Minus the derivative of each example's own final loss by its weight, [train]; without ``checks``.

        Without the Hessian, one walk backwards gives it for all examples. Otherwise they are queries, as many at once
        as there is memory for; a model with fewer parameters than there are examples takes one query per parameter.
        """
        replay, total = self._replay(setting), setting.zeros()
        if not self.hessian and self.runs == 1:
            found = self._in_one_walk(setting, replay)
            if found is not None:
                return total - found.to(total)
        blocks = self._own_blocks(setting)
        progress = ReplayProgress(setting, len(blocks) * self.runs * examples_of(replay.steps))
        for block in blocks:
            own = block.own(self._derivatives(setting, replay, block.gradients, progress))
            total[block.ids] -= own.to(total)
        progress.finish()
        self._note(setting, replay)
        return total

    def _in_one_walk(self, setting: Setting, replay: Replay) -> Tensor | None:
        progress = ReplayProgress(setting, examples_of(replay.steps))
        found = own_products(replay, self._final(setting), self.removal == "renormalize", progress)
        if found is not None:
            progress.finish()
            self._note(setting, replay)
        return found

    def _final(self, setting: Setting) -> Callable[[Sequence[int]], Gradients]:
        """Gradients of any training examples at the final weights, which are loaded each time."""
        assert setting.trajectory is not None
        last = setting.trajectory.checkpoints[-1]
        state = last.load()

        def final(ids: Sequence[int]) -> Gradients:
            put_in_place(setting.task, last, state)
            return setting.engine.gradients(setting.examples.chosen(ids))

        return final

    def _own_blocks(self, setting: Setting) -> list[ExampleQueries] | list[EntryQueries]:
        """The quantities that are derived for self-influence, in blocks of as many as fit."""
        ids = list(range(setting.n_train)) if self.examples is None else list(self.examples)
        parameters, most = (
            setting.engine.task.named_parameters(setting.engine.plan.names),
            self.queries_at_once(setting),
        )
        entries = sum(p.numel() for p in parameters.values())
        if entries < len(ids) and self.runs == 1:  # with more runs, gradients are those at the end of each
            return [EntryQueries(setting, ids, range(k, min(k + most, entries))) for k in range(0, entries, most)]
        return [ExampleQueries(setting, ids[k : k + most]) for k in range(0, len(ids), most)]

    def _derivatives(
        self, setting: Setting, replay: Replay, gradients: Callable[[], QueryGradients], progress: ReplayProgress
    ) -> Tensor:
        """Derivatives of quantities with these gradients at the end by the examples' weights, [quantity, train]."""
        if self.runs > 1:
            return self._mean(setting, replay, gradients, progress)
        setting.final()
        return adjoint(replay, gradients().dense(), self.hessian, self.removal == "renormalize", progress)

    def _note(self, setting: Setting, replay: Replay) -> None:
        if self.removal == "renormalize" and not replay.forward.mean:
            setting.note(
                "`removal='renormalize'` is the same as `'downweight'` here: the loss is a sum, without a divisor."
            )
        note_drift(setting, replay)
        if self.hessian:
            note_statistics(setting)

    def queries_at_once(self, setting: Setting) -> int:
        """As many queries as fit in half a GiB."""
        return max(1, _QUERY_BYTES // max(1, _VECTORS * setting.engine.vector_bytes))

    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Time the derivatives of a few steps, and refits of them."""
        total, replay = seconds_of(lambda: self._replay(setting)), self._replay(setting)
        total += seconds_of(setting.final) * (len(replay.segments) + 1)
        renormalize = self.removal == "renormalize"
        if queries is None and not self.hessian and self.runs == 1:
            found: list[Tensor | None] = []
            walk = lambda few: found.append(own_products(few, self._final(setting), renormalize))  # noqa: E731
            walked = seconds_of_walk(replay, walk)
            if found[-1] is not None:
                return total + walked
        blocks, made = [queries] if queries is not None else self._own_blocks(setting), []
        setting.final()
        total += len(blocks) * seconds_of(lambda: made.append(blocks[0].gradients()))
        vectors = made[0].dense()
        walked = seconds_of_walk(replay, lambda few: adjoint(few, vectors, self.hessian, renormalize))
        if self.runs > 1:
            walked = (walked + seconds_of_walk(replay, lambda few: few.run())) * self.runs
        total += walked * len(blocks)
        if queries is None:
            entries = isinstance(blocks[0], EntryQueries)
            return total + (Samples.of(setting).backward * setting.n_train * len(blocks) if entries else 0.0)
        if not self.checks:
            return total
        weights = removals(len(replay.examples), self.checks).to(next(iter(vectors.values())))
        total += seconds_of_walk(replay, lambda few: run_many(few, weights, renormalize))
        return total + Samples.of(setting).forward * self.checks * len(queries)

    def _mean(
        self, setting: Setting, replay: Replay, gradients: Callable[[], QueryGradients], progress: ReplayProgress
    ) -> Tensor:
        """The mean of the derivatives at ``runs`` fits, each without some of the examples, [query, train]."""
        total = None
        replay.run()  # raises DriftError unless the replay reproduces the fit
        for weights in removals(len(replay.examples), self.runs, seed=1):
            part = without(replay, weights == 0)
            setting.final()
            part.run().put_into(setting.task)
            found = adjoint(part, gradients().dense(), self.hessian, done=progress)
            total = found if total is None else total + found
        assert total is not None
        return total / self.runs

    def _replay(self, setting: Setting) -> Replay:
        return setting.state(self, Replay, setting.engine, setting.examples, setting.trajectory, self.max_drift)

    def _note_agreement(self, setting: Setting, replay: Replay, scores: Tensor, queries: Queries) -> None:
        """Adds the correlation of the scores with refits to the diagnostics, and a note if it is low."""
        weights = removals(len(replay.examples), self.checks)
        with setting.progress(len(weights), "HyDRA: refits", "fit") as done:
            refits = setting.state(self, Refits, replay, weights, self.removal == "renormalize", done)
        value = refits.agreement(scores, queries)
        setting.diagnostic("agreement", value, min)
        if value >= _AGREEING:
            setting.note(_ONLY_A_TENTH)
        else:
            setting.note(
                f"Agreement is {value:.2f}, below {_AGREEING}: in {counted(self.checks, 'refit')}, each without a "
                "random tenth of the examples, the queries' losses did not change as the scores predict. What really "
                "happens without an example may differ from its score. `HyDRA(runs=20)` predicts such removals "
                "better; larger batches, a lower learning rate or smoother activations make a fit easier to predict; "
                "`InfluenceFunction` and `SOURCE` are better estimates of averages over seeds."
            )


def _check_only_replay(mode: str, removal: str, runs: int) -> None:
    """Raises ValueError for arguments that ``mode="during_fit"`` does not have, or that cannot be combined."""
    if runs > 1:
        raise ValueError(
            f"Expected `mode='replay'` and `removal='downweight'` for `runs={runs}`, got {mode!r} and {removal!r}."
        )
    if removal == "renormalize":
        raise ValueError(f"Expected `mode='replay'` for `removal='renormalize'`, got {mode!r}.")
