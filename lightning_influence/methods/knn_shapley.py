"""KNNShapley: exact Shapley values of a nearest-neighbour classifier on the model's features (Jia et al., 2019)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.data.examples import Examples
from lightning_influence.devices import cumulated, wide
from lightning_influence.gradients.final_layer import last_linear
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.module.copies import Copies
from lightning_influence.module.task import Task
from lightning_influence.module.watched_index import differing_indices
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import Work, timed
from lightning_influence.types import Batch, clean, labels_in

# Queries that are timed for an estimate.
_TIMED = 16

Features = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class KNNShapley(ForwardOnly):
    r"""How much each training example adds to the share of a query's k nearest neighbours that have its label.

    .. math:: s_{(n)} = \frac{\min(k, n)}{n k} m_n, \quad
              s_{(j)} = s_{(j+1)} + \frac{m_j - m_{j+1}}{k} \frac{\min(k, j)}{j}

    with the n examples in order of their distance from the query, and m = 1 if the label is the query's, otherwise 0.
    These are exact Shapley values, and no model is trained.

    Source: Jia et al. Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms. VLDB 2019.
    Needs: the final weights.
    Units: share of neighbours with the query's label.
    Cost: one forward pass per example, and sorting the training set for each query.

    Args:
        k: number of neighbours.
        features: ``(module, batch) -> [batch, dim]``; None: the inputs of the linear layer that is called last.
        labels: ``batch -> [batch]``; None: the second part of the batch, or its "label", "y", "target" or "class".

    Raises:
        ValueError: ``k`` below 1; no linear layer, no labels where they usually are, or targets that are no classes.
    """

    k: int = 5
    features: Callable[[Any, Batch], Tensor] | None = None
    labels: Callable[[Batch], Tensor] | None = None

    def __post_init__(self) -> None:
        check_integer("k", self.k)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Shapley values of all training examples, [query, train].

        Raises:
            ValueError: a measurement, which the method would ignore.
        """
        if queries.measured:
            raise ValueError("Expected no `measurement` for `KNNShapley`, which reads no loss, got one. Leave it out.")
        embed = self.features or setting.state(self, _features_of, setting, queries)
        if self.features is None:
            _refuse_index(setting, embed)
        train, labels = self._embedded(
            embed, setting.engine.task, setting.examples, range(setting.n_train), setting.on_block
        )
        fractions = labels[labels != labels.round()] if labels.is_floating_point() else labels[:0]
        if len(fractions):
            raise ValueError(
                "Expected labels of classes for `KNNShapley`, which counts neighbours with the query's label, got "
                f"numbers such as {float(fractions[0]):.4g}. Pass `labels=`, a callable batch "
                "-> [batch] that gives classes, or use another method."
            )
        features, query_labels = self._embedded(embed, queries.engine.task, queries.examples, queries.ids)
        values = knn_shapley(torch.cdist(features, train), query_labels[:, None] == labels, self.k)
        return values.mean(0, keepdim=True) if queries.mean else values

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """Forward passes, and the distances and the order of the training examples for each query."""
        pieces = super().work(setting, queries)
        if queries is None or queries.measured:  # refused at once
            return pieces
        embed = self.features or setting.state(self, _features_of, setting, queries)
        first = range(Samples.of(setting).block.size)
        some, _ = self._embedded(embed, setting.task, setting.examples, first)
        train = some.repeat(-(-setting.n_train // len(some)), 1)[: setting.n_train]
        few = some[:_TIMED]
        same = torch.zeros(len(few), len(train), dtype=torch.bool, device=few.device)
        each = timed(lambda: knn_shapley(torch.cdist(few, train), same, self.k)) / len(few)
        return [*pieces, Work("distances and orders", len(queries.ids), each)]

    def follows_batch_index(self) -> bool:
        """True: it reads no loss; features that depend on the index are refused."""
        return True

    def unit(self, setting: Setting) -> str:
        """Share of neighbours."""
        return f"share of {self.k} nearest neighbours with the query's label"

    def hyperparameters(self) -> dict[str, Any]:
        """Functions are saved by their names."""
        return {
            "k": self.k,
            "features": getattr(self.features, "__qualname__", self.features and repr(self.features)),
            "labels": getattr(self.labels, "__qualname__", self.labels and repr(self.labels)),
        }

    def _embedded(
        self,
        embed: Features,
        task: Task,
        examples: Examples,
        ids: range,
        done: Callable[[int], Any] = lambda count: None,
    ) -> tuple[Tensor, Tensor]:
        """Features, [example, dim] float64, and labels, [example]; ``done`` is called after each block."""
        features, labels = [], []
        for block in examples.blocks(ids.start, ids.stop):
            batch = task.to_device(block.batch)
            batch = batch.batch if isinstance(batch, Copies) else batch
            with torch.no_grad():
                if self.features is None:
                    found = embed(task, batch)
                else:
                    with task.precision.computing(task.module, task.device):
                        found = embed(task.module, batch)
            found = found[: block.size] if isinstance(block.batch, Copies) else found
            if len(found) != block.size:
                raise ValueError(
                    f"Expected one row of features for each of {block.size} examples, got {len(found)} rows. Pass"
                    " `features=`, a callable (module, batch) -> [batch, dim]."
                )
            features.append(wide(found.flatten(1)))
            label = (_labels(batch) if self.labels is None else self.labels(batch))[: block.size]
            labels.append(label.to(features[-1].device))
            done(block.size)
        return torch.cat(features), torch.cat(labels)


def knn_shapley(distances: Tensor, same: Tensor, k: int) -> Tensor:
    """KNN-Shapley values, [query, train]; among equally distant examples the smaller id is nearer.

    Args:
        distances: [query, train].
        same: whether the labels are the same, [query, train].
        k: number of neighbours.
    """
    order = distances.sort(dim=1, stable=True).indices
    match = same.gather(1, order).to(torch.float64)
    n = match.shape[1]
    rank = torch.arange(1, n, dtype=torch.float64, device=match.device)
    step = (match[:, :-1] - match[:, 1:]) / k * (rank.clamp(max=k) / rank)
    last = match[:, -1:] * (min(k, n) / (n * k))
    values = torch.cat([cumulated(step.flip(1)).flip(1) + last, last], 1)
    return torch.empty_like(values).scatter_(1, order, values)


def _refuse_index(setting: Setting, embed: Features) -> None:
    """Raises ValueError where the features depend on the index of a batch."""
    task, examples = setting.task, setting.examples
    if not task.reads_index:
        return

    def features_at(index: int) -> dict[str, Tensor]:
        with task.at(index), torch.no_grad():
            return {"": embed(task, task.to_device(examples.one(0)))}

    pair = differing_indices(features_at, setting.batch_index.met)
    if pair is not None:
        raise ValueError(
            f"Expected features that do not depend on `batch_idx`, got others at {pair[1]} than at {pair[0]}. Pass "
            "`features=`, a callable (module, batch) -> [batch, dim]."
        )


def _features_of(setting: Setting, queries: Queries) -> Features:
    """A function (task, batch) -> inputs of the linear layer that is called last."""
    task = setting.engine.task
    try:
        name = last_linear(task, task.to_device(setting.examples.one(0)))
    except Exception as error:
        try:
            setting.reduction_of(queries)  # it finds out how an example is read where a batch of one fails
        except Exception as refusal:
            raise ValueError(f"{refusal} Or pass `features=`, a callable (module, batch) -> [batch, dim].") from error
        name = last_linear(task, task.to_device(setting.examples.one(0)))
    if name is None:
        raise ValueError(
            f"Expected a linear layer that the loss of {type(task.module).__name__} calls, got none. Pass `features=`, "
            "a callable (module, batch) -> [batch, dim]."
        )
    layer = next(m for n, m in task.module.named_modules() if clean(n) == name)

    def inputs(task: Task, batch: Batch) -> Tensor:
        found: list[Tensor] = []
        with layer.register_forward_pre_hook(
            lambda layer, args, kwargs: found.append([*args, *kwargs.values()][0]), with_kwargs=True
        ):
            task(batch)
        return found[-1]

    return inputs


def _labels(batch: Batch) -> Tensor:
    found = labels_in(batch)
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise ValueError("Expected labels [batch] in the batch, got none. Pass `labels=`, a callable batch -> [batch].")
    return found
