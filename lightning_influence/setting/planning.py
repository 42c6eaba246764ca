"""What is found out once about a module's gradients, at its final weights, before questions are answered."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.gradients import Engine, Plan, Reduction, Sample, make_plan, probe_examples
from lightning_influence.gradients.guard import Guard
from lightning_influence.gradients.index_check import gradient_at, joined
from lightning_influence.gradients.low_precision import LowPrecision, checked_in, compared
from lightning_influence.gradients.reduction_probe import Probed
from lightning_influence.gradients.reduction_probe import probe as probe_sample
from lightning_influence.gradients.sample import CONFIRMED, is_large
from lightning_influence.gradients.self_check import confirmed, measured
from lightning_influence.gradients.tail_check import check_tail
from lightning_influence.module.loss_tail import LossTail
from lightning_influence.module.task import Loss, Task
from lightning_influence.setting.batch_index import BatchIndex
from lightning_influence.setting.chosen_precision import other_precision
from lightning_influence.setting.explained import explained
from lightning_influence.setting.kept_checks import KeptChecks, Verdict
from lightning_influence.setting.own_counters import note_changing
from lightning_influence.setting.setting import Queries
from lightning_influence.setting.token_weights import TokenWeights, probe
from lightning_influence.setting.training_mode import note_on_training
from lightning_influence.setting.unreached import Unreached
from lightning_influence.trajectory import Trajectory

# Batches per epoch where they are unknown.
_BATCHES = 1000

_Key = tuple[int, Loss | None]
"""The id of a dataset, which is kept meanwhile, and the loss."""


@dataclass
class Findings:
    """What is known at the final weights; it is found out once for all questions.

    Args:
        plans: of the gradients, by dataset and loss, with the reduction of the loss.
        tried: reductions for queries that take no gradients, likewise.
        guards: what was checked while scoring, likewise.
        datasets: kept, so that no other object has the id of one.
        at_index: see ``BatchIndex``.
        of_clock: see ``BatchIndex``.
        values: the module's small values before and after a call of the step.
        notes: on what the step changes; None: not known yet.
        tokens: the weights of examples in a mean over tokens.
        share_of_copies: see ``Examples``.
        low: the plans that were checked in a precision of 16 bits, by dataset and loss.
        compared: gradients in 16 bits with those in full precision, once they were; None: they cannot be.
        tails: where the part of a loss that is computed in float64 begins, by dataset and loss.
        unreached: parameters that the loss in eval mode does not depend on.
        thorough: see ``Examples``.
        confirmed: whether a plan for queries is that of the training examples, tried on a few of them.
        kept: whether the plan of these is one of an earlier process, tried on a few of them.
    """

    plans: dict[_Key, tuple[Reduction, Plan]] = field(default_factory=dict)
    tried: dict[_Key, Reduction] = field(default_factory=dict)
    guards: dict[_Key, Guard] = field(default_factory=dict)
    datasets: list[Any] = field(default_factory=list)
    at_index: dict[int | None, tuple[int, int] | None] = field(default_factory=dict)
    of_clock: dict[tuple[str, int], tuple[int, int] | None] = field(default_factory=dict)
    values: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] | None = None
    tails: dict[_Key, LossTail] = field(default_factory=dict)
    low: dict[_Key, Plan] = field(default_factory=dict)
    compared: list[LowPrecision | None] = field(default_factory=list)
    tokens: TokenWeights = field(default_factory=TokenWeights)
    share_of_copies: float | None = None
    unreached: Unreached = field(default_factory=Unreached)
    thorough: bool = False
    confirmed: bool = False
    kept: bool = False


@dataclass
class Planner:
    """Finds out how gradients are computed, and keeps what it found.

    Args:
        train: the training data.
        trajectory: of the fit, if it is known.
        names: the parameters whose gradients are used.
    """

    train: Source
    trajectory: Trajectory | None
    names: Sequence[str]
    found: Findings = field(default_factory=Findings)

    def engine(self, task: Task, examples: Examples, index: BatchIndex) -> Engine:
        """The engine for the training examples, checked."""
        with task.in_full():
            reduction, plan = self._planned(task, examples, index)
            self._settle_tail(task, examples)
        engine = self._engine(task, examples, reduction, plan, examples)
        other = other_precision(task) or task.precision
        if other != other.full and not self.found.compared:
            with task.in_full():
                found = compared(engine, Sample(task, examples, self.names), other)
            if found is not None and other == task.precision:
                found.refuse_lost(other.name)
            self.found.compared.append(found)
        return self._checked(engine, examples)

    def query_engine(self, task: Task, data: Examples, examples: Examples) -> Engine:
        """The engine for queries, checked; that for the training examples has been made."""
        with task.in_full():
            planned = self._planned_for(task, data, examples)
            self._settle_tail(task, data)
        return self._checked(self._engine(task, data, *planned), data)

    def _checked(self, engine: Engine, data: Examples) -> Engine:
        """The engine with its plan checked in its task's precision as well, where that is of 16 bits."""
        task, key = engine.task, _key(engine.task, data.dataset)
        if task.precision == task.precision.full:
            return engine
        if key not in self.found.low:
            self.found.low[key] = checked_in(engine, Sample(task, data, self.names, trained=False))
        engine.plan = self.found.low[key]
        return engine

    def _settle_tail(self, task: Task, data: Examples) -> None:
        """Where part of the loss may be computed in float64, it is checked once; later tasks do the same."""
        key = _key(task, data.dataset)
        if key in self.found.tails:
            task.tail = self.found.tails[key]
        elif task.tail.layers is not None:
            check_tail(task, data, self.names)
            self.found.tails[key] = task.tail

    def finished(self, *engines: Engine) -> None:
        """To be called with the engines of a question that was answered, whose checks later ones build on."""
        for engine in engines:
            if engine.guard.dataset is not None and not engine.guard.refused:
                self.found.guards[_key(engine.task, engine.guard.dataset)] = engine.guard

    def _engine(
        self, task: Task, data: Examples, reduction: Reduction, plan: Plan, trained: Examples | None = None
    ) -> Engine:
        weights = self.found.tokens.of(task, data, reduction)
        known = self.found.guards.get(_key(task, data.dataset))
        guard = Guard(dataset=data.dataset) if known is None else known.again()
        return Engine(task, reduction, self._groups(), plan=plan, examples=trained, guard=guard, weights=weights)

    def _groups(self) -> Mapping[str, int]:
        if self.trajectory is None or self.trajectory.n_groups == 1:
            return {}
        known = self.trajectory.parameter_groups
        return {name: known[name] for name in self.names}

    # ---- the training examples ------------------------------------------------------------------------------------

    def batch_index(self, task: Task, examples: Examples) -> BatchIndex:
        """Which indices batches had in the fit, and how to find whether the loss depends on them."""
        trajectory = self.trajectory
        recorded = None if trajectory is None else trajectory.batch_indices
        known = trajectory is not None and recorded is not None and trajectory.has_batch_order
        run = None if task.loss is not None else gradient_at(task, examples, self.names, task.at)
        met = recorded or range(self.train.batches or _BATCHES)
        found = self.found
        return BatchIndex(run, task.reads_index, met, known, found=found.at_index, of_clock=found.of_clock)

    def _planned(self, task: Task, examples: Examples, index: BatchIndex) -> tuple[Reduction, Plan]:
        """Reduction and plan of the training examples' gradients, from the self-check."""
        key = _key(task, examples.dataset)
        if key not in self.found.plans:
            kept = None
            if self.found.tokens.probed is None:  # otherwise something was found out since
                kept = KeptChecks.of(task, Sample(task, examples, self.names), self.trajectory, index.first)
            verdict = None if kept is None else kept.read()
            found = None if verdict is None else self._confirmed(task, examples, verdict)
            if found is None:
                verdict, sample = None, self._sample(task, examples)
                engine = self._engine(task, examples, self._reduction(), Plan({}), examples)
                plan = make_plan(engine, sample, self.names)
            else:
                engine, sample, plan = found
            reduction = self._reduction()
            if not sample.uses_of_index:
                index.found.setdefault(self._last, None)
            pair = index.differing(self._last)
            if pair is not None:
                plan = joined(plan, self._plan_at(task, examples, reduction, pair))
            plan = measured(engine, sample, plan) if plan.bytes_of_one is None else plan
            self.found.plans[key] = reduction, plan
            self.found.values = sample.values
            if verdict is not None:
                self.found.unreached = Unreached(note=verdict.note)
                return self.found.plans[key]
            version = task.version
            engine = self._engine(task, examples, reduction, plan)
            self.found.unreached = unreached = self._unreached(engine, sample)
            task.weights_returned(version)
            if kept is not None and pair is None and unreached.error is None:
                kept.keep(reduction, plan, unreached.note)
        return self.found.plans[key]

    def _confirmed(self, task: Task, examples: Examples, verdict: Verdict) -> tuple[Engine, Sample, Plan] | None:
        """The plan of a verdict that was kept, if it is right for two examples; None if it is in any way in doubt."""
        examples.check_steady()
        sample = Sample(task, examples, self.names, few=CONFIRMED)
        with contextlib.suppress(Exception):  # then all are checked, which meets the error as well and says more
            probed, plan = probe_sample(sample), verdict.plan_for(sample)
            engine = self._engine(task, examples, verdict.reduction, Plan({}), examples)
            if probed == Probed(verdict.reduction) and plan is not None and confirmed(engine, sample, plan):
                self.found.tokens.probed, self.found.kept = probed, True
                return engine, sample, plan
        return None

    def _plan_at(self, task: Task, examples: Examples, reduction: Reduction, pair: tuple[int, int]) -> Plan:
        """The plan at another index of the batch."""
        with task.at(pair[1]):
            probed, sample = probe_examples(task, examples, self.names)
            if probed.reduction is not reduction:
                raise ValueError(
                    f"Expected one reduction of the loss of a batch, got {reduction.value!r} at `batch_idx={pair[0]}` "
                    f"and {probed.reduction.value!r} at {pair[1]}. Pass `loss=`, a callable (module, batch) -> [batch] "
                    "of per-sample losses."
                )
            engine = self._engine(task, examples, reduction, Plan({}), examples)
            return make_plan(engine, sample, self.names)

    def _unreached(self, engine: Engine, sample: Sample) -> Unreached:
        found = Unreached.of(engine, sample.examples, self.trajectory)
        if found != Unreached():
            return found
        frozen = () if self.trajectory is None else self.trajectory.eval_modules
        return Unreached(note=note_on_training(engine, sample, frozen))

    @property
    def _last(self) -> int | None:
        """Position of the last checkpoint in the trajectory."""
        return None if self.trajectory is None else len(self.trajectory.checkpoints) - 1

    def _sample(self, task: Task, examples: Examples) -> Sample:
        """A few training examples, with their gradients; the reduction is known afterwards."""
        sample = None
        if self.found.tokens.probed is None or not self.found.tokens.again:
            sample = self._probe(task, examples, self.names)
        return sample if sample is not None and sample.task is task else Sample(task, examples, self.names)

    def _probe(self, task: Task, examples: Examples, names: Sequence[str] = ()) -> Sample:
        examples.check_steady()
        self.found.tokens.probed, sample = probe(task, examples, names)
        self.found.share_of_copies = examples.share_of_copies
        return sample

    def _reduction(self) -> Reduction:
        assert self.found.tokens.probed is not None
        return self.found.tokens.probed.reduction

    def notes_on_values(self, task: Task, examples: Examples) -> list[str]:
        """Sentences on values that change with every batch of a fit."""
        if self.found.notes is None:
            with task.in_full():
                self.found.notes = note_changing(task, examples, self.names, self.trajectory, self.found.values)
            self.found.values = []
        return self.found.notes

    # ---- queries --------------------------------------------------------------------------------------------------

    def _planned_for(self, task: Task, data: Examples, examples: Examples) -> tuple[Reduction, Plan]:
        """Reduction and plan of the queries' gradients, from the self-check."""
        key = _key(task, data.dataset)
        if key not in self.found.plans:
            data.check_steady()
            reduction = Reduction.NONE if task.loss is not None else self._reduction()
            with explained(examples, data):
                engine = self._engine(task, data, reduction, Plan({}))
                _, plan = self.found.plans.get(_key(task, examples.dataset), (reduction, None))
                plan = None if data.thorough else plan
                sample = Sample(task, data, self.names, trained=False, few=CONFIRMED)
                if plan is not None and confirmed(engine, sample, plan):
                    self.found.confirmed = True
                else:
                    sample = Sample(task, data, self.names, trained=False)
                    plan = make_plan(engine, sample, self.names)
                self.found.plans[key] = reduction, measured(engine, sample, plan)
            self.found.datasets.append(data.dataset)
        return self.found.plans[key]

    def reduction_of(self, task: Task, examples: Examples, queries: Queries | None) -> Reduction:
        """See ``Setting.reduction_of``. The first query is tried once, so that queries that do not fit are refused."""
        if self.found.tokens.probed is None:
            with task.in_full():
                self._probe(task, examples)
        reduction = self._reduction()
        if queries is None:
            return reduction
        task, data = queries.engine.task, queries.examples
        data.share_of_copies = self.found.share_of_copies
        key = _key(task, data.dataset)
        if key not in self.found.tried:
            data.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with explained(examples, data):
                reduction.total(task(task.to_device(data.one(0))), 1)
            self.found.tried[key] = reduction
            self.found.datasets.append(data.dataset)
        return self.found.tried[key]

    def probe_again(self, task: Task, examples: Examples, block: Sequence[int]) -> bool:
        """Probe the loss once more with some examples of a batch; whether it turns out to be a mean over tokens."""
        with task.in_full():
            found = self.found.tokens.find_again(task, examples, self.names, block)
        if found:
            self._forget_plans()
        return found

    def checks_more(self, task: Task, of_queries: bool) -> bool:
        """Check as many examples as of a small model from now on; whether they were fewer so far.

        Args:
            task: the module.
            of_queries: whether it is queries of which too few were checked.
        """
        fewer = is_large(task) or self.found.kept or (of_queries and self.found.confirmed)
        if self.found.thorough or not fewer:
            return False
        self.found.thorough = True
        self.found.tokens = TokenWeights()
        self._forget_plans()
        return True

    def _forget_plans(self) -> None:
        self.found.plans.clear()
        self.found.low.clear()
        self.found.tried.clear()
        self.found.guards.clear()

    @property
    def may_be_of_tokens(self) -> bool:
        """Whether the loss was found to be a mean over examples, which may have had equally many tokens."""
        probed = self.found.tokens.probed
        return probed is not None and probed.reduction is Reduction.MEAN


def _key(task: Task, dataset: Any) -> _Key:
    return id(dataset), task.loss
