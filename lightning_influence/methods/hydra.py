"""HyDRA: the derivative of a query's final loss by each training example's weight in training (Chen et al., 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.replay import MAX_DRIFT, Replayed
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking import Tracker, load_record, record_name
from lightning_influence.tracking.fast_hydra import FastHyDRA
from lightning_influence.tracking.hypergradients import Hypergradients
from lightning_influence.tracking.visits import add_products
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True)
class HyDRA(Method):
    r"""How much higher a query's loss would be had the example been left out of this very fit, to first order.

    .. math:: s(q, z_i) = -\nabla\ell(w_T, q) \cdot \frac{d w_T}{d \omega_i}

    Source: Chen, Li, Yu, Wu, Miao. HyDRA: Hypergradient Data Relevance Analysis for Interpreting Deep Neural Networks.
    AAAI 2021. ``mode="replay"`` is its adjoint: Ilyas, Engstrom. MAGIC: Near-Optimal Data Attribution for Deep
    Learning. 2025.
    Needs: to watch the fit, or for ``"replay"`` its batch order, learning rates and checkpoints.
    Units: query loss.
    Cost: ``"replay"``: the fit once more, and for each query about two steps' worth a step (one without the Hessian);
    memory: the states between two checkpoints, and some vectors of the model's size a query.
    ``"during_fit"``: with the Hessian, one Hessian-vector product a tracked example and step; without it, for SGD,
    the gradients of the examples at each visit, for Adam one elementwise pass over a vector of the model's size an
    example and step.
    Departs from the paper: nothing is left out of the Hessian; an example counts at the steps that it *is* in (the
    printed algorithm has this the other way round).

    Args:
        mode: ``"replay"`` runs a captured fit once more and walks it backwards, for all examples at once;
            ``"during_fit"`` follows the hypergradients while the fit runs.
        hessian: whether a change of the weights changes the gradients after it; without it, the paper's fast
            approximation.
        examples: ids of the training examples to track; None: all.
        memory: ``"during_fit"``: bytes that may stay in memory, beyond which a file takes over.
        removal: left out means weight 0 with the divisor of the batch unchanged (``"downweight"``), or, by replay,
            divided by the sum of the weights (``"renormalize"``).
        max_drift: a replay that strays from the captured weights by more, relative to the distance that they moved
            between checkpoints, is an error.
        runs: by replay, 1: the derivative at the fit itself. More: the mean of the derivatives at so many fits, each
            without a random tenth of the examples, for fits too rough to follow a single derivative as far as an
            example's removal (``agreement`` tells).
        checks: by replay, refits side by side, each without a random tenth of the examples, whose changes of the
            queries' losses the scores are held against; ``Scores.figures["agreement"]`` is the correlation of
            predicted with true changes, which says how far to trust the scores. 0: none.

    Raises:
        ValueError: other values; an optimizer without a rule; by replay, a loss that mixes examples in training without
            ``loss=``.
        MissingEvidence: asked for a fit that it did not watch, or that was not captured step by step.
        DriftError: a replay that is not the fit.
    """

    mode: Literal["replay", "during_fit"] = "replay"
    hessian: bool = True
    examples: tuple[int, ...] | None = None
    memory: int = 2**30
    removal: Literal["downweight", "renormalize"] = "downweight"
    max_drift: float = MAX_DRIFT
    runs: int = 1
    checks: int = 4

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("replay", "during_fit"))
        one_of("hessian", self.hessian, (True, False))
        one_of("removal", self.removal, ("downweight", "renormalize"))
        if self.removal == "renormalize" and self.mode != "replay":
            raise ValueError(f"Expected `mode='replay'` for `removal='renormalize'`, got {self.mode!r}.")
        if not self.max_drift > 0:
            raise ValueError(f"Expected `max_drift` to be a positive number, got {self.max_drift!r}.")
        if isinstance(self.checks, bool) or not isinstance(self.checks, int) or self.checks < 0 or self.checks == 1:
            raise ValueError(f"Expected `checks` to be 0 or at least 2 refits, got {self.checks!r}.")
        if isinstance(self.runs, bool) or not isinstance(self.runs, int) or self.runs < 1:
            raise ValueError(f"Expected `runs` to be a positive whole number, got {self.runs!r}.")
        if self.runs > 1 and (self.mode != "replay" or self.removal != "downweight"):
            raise ValueError(
                f"Expected `mode='replay'` and `removal='downweight'` for `runs={self.runs}`, got {self.mode!r} and "
                f"{self.removal!r}."
            )
        if self.examples is not None:
            object.__setattr__(self, "examples", tuple(sorted({int(i) for i in self.examples})))

    @property
    def needs(self) -> Evidence:  # type: ignore[override]
        """By its mode."""
        return Evidence.TRACKER if self.mode == "during_fit" else Evidence.CHECKPOINTS | Evidence.BATCH_ORDER

    @property
    def walks(self) -> bool:  # type: ignore[override]
        """One replay scores every example."""
        return self.mode == "replay"

    def tracker(self) -> Tracker | None:
        """Follows hypergradients as vectors, or visits where numbers suffice."""
        if self.mode == "replay":
            return None
        if self.hessian:
            return Hypergradients(True, self.examples, self.memory)
        return FastHyDRA(self.examples, self.memory)

    def scored(self, n_train: int) -> Sequence[int] | None:
        """The tracked examples."""
        return self.examples

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]; zeros for examples that were not tracked, which the driver leaves out."""
        if self.mode == "replay":
            return self._replayed.score(setting, queries)
        assert setting.trajectory is not None
        assert setting.trajectory.path is not None
        stage, total = setting.final(), setting.zeros(queries)
        record = load_record(setting.trajectory.path, record_name("HyDRA", self.settings()), stage.step)
        query = queries.once((self, stage.step), lambda: stage.gradients(queries))
        if record.facts["kind"] == "visits":
            add_products(total, setting.ids.start, query, record, setting.trajectory.path.parent)
            setting.on_block(len(setting.ids))
            return -total
        ids = record.tensors["ids"]
        vectors = {n.partition("|")[2]: v for n, v in record.tensors.items() if n.startswith("weight|")}
        width = sum(v[0].numel() for v in vectors.values())
        inside = ((ids >= setting.ids.start) & (ids < setting.ids.stop)).nonzero()[:, 0]
        for slots in inside.split(max(1, 2**24 // width)):
            rows: dict[Names, Part] = {(name,): DenseRows((v[slots].to(total),)) for name, v in vectors.items()}
            block = Gradients(rows, {}, len(slots))
            total[:, (ids[slots] - setting.ids.start).to(total.device)] = -query.dot(block)
        setting.on_block(len(setting.ids))
        return total

    def at_once(self, setting: Setting) -> int | None:
        """By replay, as many queries as their vectors fit."""
        return self._replayed.at_once(setting) if self.mode == "replay" else None

    def seconds(self, setting: Setting, queries: Queries) -> float | None:
        """By replay, from the time of a few steps."""
        return self._replayed.seconds(setting, queries) if self.mode == "replay" else None

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The final weights: earlier ones are where a replay starts from."""
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def unit(self, setting: Setting) -> str:
        """Loss."""
        return "loss"

    @property
    def _replayed(self) -> Replayed:
        return Replayed(self.hessian, self.removal, self.max_drift, self.runs, self.checks)
