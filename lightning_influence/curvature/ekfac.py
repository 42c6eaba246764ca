"""EK-FAC: each layer's Fisher matrix in a Kronecker-factored eigenbasis, with eigenvalues measured in that basis."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_at_least_0, one_of
from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.descent import Descent
from lightning_influence.curvature.ekfac_cost import FactorSamples, stand_in
from lightning_influence.curvature.factors import LayerFactors, add_block, decompose, part_of, with_parts
from lightning_influence.curvature.fisher_samples import FisherSamples
from lightning_influence.curvature.kronecker_descent import descend_layer
from lightning_influence.curvature.kronecker_part import KroneckerPart
from lightning_influence.curvature.kronecker_queries import KroneckerQueries, lower_ranks
from lightning_influence.curvature.layer_inverses import LayerInverses, by_layer
from lightning_influence.curvature.own_descent import OwnVectors, descend_own
from lightning_influence.curvature.own_products import own_products
from lightning_influence.devices import read_numbers
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.processes import Processes
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed
from lightning_influence.wording import counted

# Up to this many classes the expectation over labels is computed, at one pass per class, instead of sampled.
_FEW_CLASSES = 10
# Training examples on which the error of low-rank eigenvalues is measured.
_SAMPLED = 64


@dataclass
class _LastLayers:
    """The latest inverses of all layers, and the prepared curvature they belong to."""

    prepared: PreparedCurvature | None = None
    layers: LayerInverses | None = None


@dataclass(frozen=True)
class EKFAC(Curvature):
    r"""The inverse of the Fisher matrix, approximated per layer by a Kronecker-factored eigenbasis (EK-FAC).

    .. math:: F \approx (Q_S \otimes Q_A)\,\Lambda\,(Q_S \otimes Q_A)^\top

    :math:`Q_A` and :math:`Q_S` are the eigenvectors of the second moments of a layer's inputs (with a 1 appended for
    the bias) and of its output gradients; :math:`\Lambda` holds the mean squares of the per-sample gradients in that
    basis. Different layers are taken as independent. Linear layers, convolutions, recurrent cells and other matrix
    parameters are factored, grouped convolutions by means of their dense gradients. Embedding tables, normalisation
    layers and biases of their own have a diagonal Fisher. A weight that is used twice has one sum over both uses. No
    parameter is left out.

    Source: George et al. Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis. NeurIPS 2018;
    Grosse et al. Studying Large Language Model Generalization with Influence Functions. 2023. ``corrected=False``:
    Martens, Grosse. Optimizing Neural Networks with Kronecker-factored Approximate Curvature. ICML 2015.
    Cost: two passes over the training data (per class with exact labels; one pass with ``corrected=False``, or if its
    gradients fit in 256 MiB) and an eigendecomposition of each factor, once; then one backward pass per example and a
    few matrix products.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        corrected: True to measure the eigenvalues in the basis (EK-FAC), False for the products of the factors' own
            eigenvalues (K-FAC).
        labels: ``"sampled"``: the Fisher with one label per example, sampled from the model. ``"exact"``: the
            expectation over labels, at one pass per class. Both estimate the Gauss-Newton matrix for cross-entropy,
            binary cross-entropy and squared error, and need a model that ends in a linear layer. ``"empirical"``: the
            empirical Fisher, with the labels of the data. None: exact up to 10 classes, sampled beyond, empirical if
            the model allows neither; the notes of the scores name the choice.
        seed: of the sampled labels.
        tolerance: the inverse eigenvalues of a layer with one position per example (no sequence or image dimensions)
            are approximated at the lowest rank that keeps the relative error of the scores within this, in root mean
            square over sampled pairs. The notes give the error. 0 to use them exactly.

    Raises:
        ValueError: an argument is out of range; the Fisher is singular without damping; the model has no linear layer
            whose outputs ``labels`` can be sampled from.
    """

    corrected: bool = True
    labels: Literal["sampled", "exact", "empirical"] | None = None
    seed: int = 0
    tolerance: float = 0.02

    kind: ClassVar[str] = "Fisher"
    has_eigenvalues: ClassVar[bool] = True
    copies: ClassVar[int | None] = 1
    # Measured (tests/benchmarks/quality.py): best between an eighth and a quarter of the rule, in both settings there.
    share: ClassVar[float] = 0.2
    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "tolerance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("labels", self.labels, (None, "sampled", "exact", "empirical"))
        check_at_least_0("tolerance", self.tolerance, below=1)

    # ---- once per set of weights ------------------------------------------------------------------------------------

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """The bases and eigenvalues, or the diagonals, of every layer."""
        samples, why = self._fisher_samples(setting)
        shapes = {name: tuple(p.shape) for name, p in setting.engine.task.named_parameters().items()}
        passes = samples.draws * (2 if self.corrected else 1)
        processes = setting.processes if setting.processes.shares(setting.n_train) else Processes()
        own = len(processes.share(setting.n_train))
        with setting.progress(passes * own, f"{type(self).__name__}: factors") as done:
            factors = self._added(samples, shapes, done)
            forms = [(names, layer.sides, layer.transposed) for names, layer in factors.items()]
            if any(other != forms for other in processes.gathered(forms)):  # its examples reach layers otherwise
                return self.prepare(replace(setting, processes=Processes()))
            for layer in factors.values():
                layer.join(processes)
            ranks = processes.dealt([layer.cost for layer in factors.values()])
            decompose(layer for layer, rank in zip(factors.values(), ranks, strict=True) if rank == processes.rank)
            for layer, rank in zip(factors.values(), ranks, strict=True):
                layer.take_bases(processes, rank)
            if self.corrected:
                for gradients in samples:
                    for layer, part in with_parts(factors, gradients, shapes):
                        layer.measure(part)
                    done(len(gradients))
            for layer in factors.values():
                layer.join_measured(processes)
        sums: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        for names, layer in factors.items():
            # With an expectation over labels there are several gradients per example.
            layer.count = setting.n_train
            kept = layer.tensors()
            tensors |= {f"{'|'.join(names)}/{key}": tensor for key, tensor in kept.items()}
            sums += [t.sum() for key, t in kept.items() if key == "eigenvalues" or "diagonal" in key]
        total = sum(each for (each,) in read_numbers(sums))
        size = sum(math.prod(shapes[name]) for name in setting.engine.plan.names)
        notes = (self._note(factors, samples.labels, why),)
        return PreparedCurvature(tensors, {"mean_eigenvalue": total / size}, notes)

    def _added(
        self, samples: FisherSamples, shapes: Mapping[str, tuple[int, ...]], done: Callable[[int], Any]
    ) -> dict[Names, LayerFactors]:
        """The layers after the first pass over the gradients; ``done`` is called after each block."""
        factors: dict[Names, LayerFactors] = {}
        for gradients in samples:
            add_block(factors, gradients, shapes, self.corrected)
            done(len(gradients))
        return factors

    def _fisher_samples(self, setting: Setting) -> tuple[FisherSamples, str]:
        """Gradients with the labels of the field ``labels``, and why the labels of the data if they are a fallback."""
        if self.labels is not None:
            return FisherSamples(setting, self.labels, self.seed), ""
        try:
            samples = FisherSamples(setting, "sampled", self.seed)
            samples.labels = "exact" if samples.classes <= _FEW_CLASSES else "sampled"
            return samples, ""
        except ValueError:
            why = ", since the model has no linear head to sample labels from"
            return FisherSamples(setting, "empirical", self.seed), why

    def _note(self, factors: Mapping[Names, LayerFactors], labels: str, why: str) -> str:
        which = {"empirical": "empirical Fisher", "sampled": "Fisher with sampled labels", "exact": "Fisher"}[labels]
        name = "EK-FAC" if self.corrected else "K-FAC"
        count = sum(f.sides is not None for f in factors.values())
        text = f"{name} of the {which}{why}: {counted(count, 'layer')} approximated by Kronecker factors"
        rest = [name for names, f in factors.items() if f.sides is None for name in names]
        shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        return f"{text}; with a diagonal Fisher: {shown}" if rest else text

    def seconds_of_own_descent(
        self, setting: Setting, gradients: QueryGradients, descent: Descent
    ) -> tuple[Any, float, float]:
        """By carrying them twice."""
        prepared = self.sampled(setting)
        moved, kept = self.descend_own(prepared, gradients, setting, descent)
        first = timed(lambda: self.descend_own(prepared, gradients, setting, descent))
        return moved, first, timed(lambda: self.descend_own(prepared, kept, setting, descent))

    def seconds_of_preparing(self, setting: Setting) -> float:
        """Passes over the gradients for each label, the factors' sums and eigendecompositions, and the eigenvalues."""
        return FactorSamples(setting, lambda few: self._fisher_samples(few)[0], self.corrected).seconds()

    def sampled(self, setting: Setting) -> PreparedCurvature:
        """Prepared on a few examples, in the sizes of that of all."""
        exact = self._fisher_samples(setting)[0].labels == "exact"
        return stand_in((replace(self, labels="sampled") if exact else self).prepare, setting)

    def like_solved(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Solved, which takes little: its time counts with that of the queries' gradients."""
        return self.solve(prepared, queries, setting, diagonal)

    # ---- for every block of queries ---------------------------------------------------------------------------------

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """The inverse Fisher times each query's gradient, kept in factors where the gradients are."""
        layers = self._layers(prepared, setting, diagonal)
        if not isinstance(queries, EachQuery):
            vectors = queries.dense()
            return DenseQueries(layers.solve(vectors) or vectors, setting.engine.groups)
        joint: dict[Names, Part] = {}
        others: list[dict[Names, Part]] = [{} for _ in queries.blocks]
        for names in layers:
            parts = [part_of(block, names, layers.shapes) for block in queries.blocks]
            if names in layers.inverses:
                solved = layers.solve_blocks(names, parts, [len(block) for block in queries.blocks])
                if solved is not None:
                    joint[names] = solved
            else:
                for of_block, part in zip(others, parts, strict=True):
                    if part is not None:
                        of_block[names] = layers.solve_diagonal(names, part)
        size = sum(len(block) for block in queries.blocks)
        groups = {names: setting.engine.groups.get(names[0], 0) for names in layers}
        blocks = [Gradients(parts, groups, len(b)) for parts, b in zip(others, queries.blocks, strict=True)]
        at_low_rank = (lambda parts: self._at_low_rank(prepared, parts, setting)) if self.tolerance else None
        return KroneckerQueries(Gradients(joint, groups, size), blocks, at_low_rank)

    def own_products(
        self,
        prepared: PreparedCurvature,
        gradients: Gradients,
        setting: Setting,
        diagonal: Tensor,
        powers: Sequence[int] = (1,),
    ) -> Tensor:
        """The same in each layer's eigenbasis, where only squared entries are needed; always exact."""
        return own_products(self._layers(prepared, setting, diagonal), gradients, powers)

    def _layers(self, prepared: PreparedCurvature, setting: Setting, diagonal: Tensor) -> LayerInverses:
        """The inverses of all layers, made once."""
        kept = setting.state((self, tuple(diagonal.tolist())), _LastLayers)
        if kept.layers is None or kept.prepared is not prepared:  # of one checkpoint at a time
            kept.prepared, kept.layers = prepared, LayerInverses(prepared, setting, diagonal).completed()
        return kept.layers

    def descend(
        self, prepared: PreparedCurvature, vectors: Mapping[str, Tensor], setting: Setting, descent: Descent
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F v and S^T v in each layer's eigenbasis, with the diagonal of the preconditioner there.

        For layers with a diagonal Fisher, and for a preconditioner that is constant within a layer, this is exact.
        """
        _note_neglected(setting, descent)
        moved: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for names, tensors in by_layer(prepared).items():
            of_layer = descend_layer(names, tensors, descent, vectors)
            moved, kept = moved | of_layer[0], kept | of_layer[1]
        return moved, kept

    def descend_own(
        self, prepared: PreparedCurvature, vectors: QueryGradients | OwnVectors, setting: Setting, descent: Descent
    ) -> tuple[OwnVectors, OwnVectors]:
        """The same, where vectors stay in the eigenbases and go from one stretch's to those of the next."""
        _note_neglected(setting, descent)
        return descend_own(prepared, vectors, setting, descent)

    def _at_low_rank(
        self, prepared: PreparedCurvature, joint: Mapping[Names, Part], setting: Setting
    ) -> Mapping[Names, Part]:
        parts = {names: part for names, part in joint.items() if isinstance(part, KroneckerPart)}
        if not parts:
            return {}
        tensors = by_layer(prepared)
        weights = {}
        for names, part in parts.items():
            sides = (tensors[names][f"values_{side}"] for side in ("out", "in"))
            left, right = (_filled(v, size) for v, size in zip(sides, part.inverse.table.shape, strict=True))
            weights[names] = left, right
        found, error = lower_ranks(parts, weights, _sample(setting), self.tolerance)
        setting.diagnostic("score_error", error)
        if error:
            setting.note(
                f"The inverse eigenvalues are approximated at low rank: the scores have a relative error of "
                f"{error:.2g}, in root mean square over sampled pairs (`tolerance={self.tolerance:g}`; 0 is exact)"
            )
        return found


def _note_neglected(setting: Setting, descent: Descent) -> None:
    if descent.preconditions:
        setting.note(
            "The optimizer's preconditioner is not diagonal in the layers' Kronecker eigenbases: only its diagonal "
            "there is used, an approximation that `ExactGGN()` does not make"
        )


def _filled(values: Tensor, size: int) -> Tensor:
    """Eigenvalues in descending order, with the least repeated for the directions that a basis was completed by."""
    return torch.cat([values, values[-1:].expand(size - len(values))])


def _sample(setting: Setting) -> Gradients:
    """Gradients of a few training examples, evenly spread over the dataset."""
    count = min(_SAMPLED, setting.n_train)
    # Rounded down, unlike `evenly_spread`: other ids change `score_error` (0.0082 to 0.0080 on one MLP).
    ids = [i * (setting.n_train - 1) // max(1, count - 1) for i in range(count)]
    return setting.engine.gradients(setting.examples.chosen(ids), again=setting.examples.chosen)
