"""HyDRA: the derivative of a query's final loss by each training example's weight in training (Chen et al., 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rows import Rows
from lightning_influence.method import Evidence, Method, one_of
from lightning_influence.setting import Queries, Setting
from lightning_influence.tracking import Tracker, load_record, record_name
from lightning_influence.tracking.fast import Fast
from lightning_influence.tracking.hypergradients import Hypergradients
from lightning_influence.tracking.visits import add_products


@dataclass(frozen=True)
class HyDRA(Method):
    r"""How much higher a query's loss would be had the example been left out of this very fit, to first order.

    .. math:: s(q, z_i) = -\nabla\ell(w_T, q) \cdot \frac{d w_T}{d \omega_i}

    Source: Chen, Li, Yu, Wu, Miao. HyDRA: Hypergradient Data Relevance Analysis for Interpreting Deep Neural Networks.
    AAAI 2021.
    Needs: to watch the fit.
    Units: query loss.
    Cost: with the Hessian, one Hessian-vector product a tracked example and step; without it, for SGD, the gradients of
    the examples at each visit, for Adam one elementwise pass over a vector of the model's size an example and step.
    Departs from the paper: nothing is left out of the Hessian; an example counts at the steps that it *is* in (the
    printed algorithm has this the other way round).

    Args:
        mode: ``"during_fit"`` follows the hypergradients while the fit runs.
        hessian: whether a change of the weights changes the gradients after it; without it, the paper's fast
            approximation.
        examples: ids of the training examples to track; None: all.
        memory: bytes that may stay in memory, beyond which a file takes over.

    Raises:
        ValueError: other values.
        MissingEvidence: asked for a fit that it did not watch.
    """

    mode: Literal["during_fit"] = "during_fit"
    hessian: bool = True
    examples: tuple[int, ...] | None = None
    memory: int = 2**30
    needs: ClassVar[Evidence] = Evidence.TRACKER

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("during_fit",))
        one_of("hessian", self.hessian, (True, False))
        if self.examples is not None:
            object.__setattr__(self, "examples", tuple(sorted({int(i) for i in self.examples})))

    def tracker(self) -> Tracker:
        """Follows hypergradients as vectors, or visits where numbers suffice."""
        if self.hessian:
            return Hypergradients(True, self.examples, self.memory)
        return Fast(self.examples, self.memory)

    def scored(self, n_train: int) -> Sequence[int] | None:
        """The tracked examples."""
        return self.examples

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]; zeros for examples that were not tracked, which the driver leaves out."""
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
            rows: dict[Names, Part] = {(name,): Rows((v[slots].to(total),)) for name, v in vectors.items()}
            block = Gradients(rows, {}, len(slots))
            total[:, (ids[slots] - setting.ids.start).to(total.device)] = -query.dot(block)
        setting.on_block(len(setting.ids))
        return total

    def unit(self, setting: Setting) -> str:
        """Loss."""
        return "loss"
