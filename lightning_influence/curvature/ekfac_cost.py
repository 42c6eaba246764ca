"""What preparing an EK-FAC curvature takes, and what stands for it while other work is timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.factors import LayerFactors, add_block, with_parts
from lightning_influence.curvature.fisher_samples import KEPT_BYTES, FisherSamples
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.numerics.dense import eigenpairs
from lightning_influence.numerics.kronecker import STORED
from lightning_influence.setting.samples import Samples, first_examples
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import seconds_of, timed

# The most training examples that a block is computed of, and the most rows of a factor, for an estimate.
_EXAMPLES, _ROWS = 256, 512
# Gradients of each of them, with an expectation over labels.
_LABELS = 2
# Rows of the matrix whose eigendecomposition is timed.
_SIDE = 512


@dataclass
class FactorSamples:
    """The work of preparing an EK-FAC curvature on the first training examples, in pieces.

    Args:
        setting: of the question.
        samples_of: the gradients of a question's training examples.
        corrected: as of ``EKFAC``.
    """

    setting: Setting
    samples_of: Callable[[Setting], FisherSamples]
    corrected: bool
    blocks: list[Gradients] = field(default_factory=list)

    def __post_init__(self) -> None:
        few = first_examples(self.setting, self.setting.examples.block_size)  # in larger blocks they take less time
        made: list[FisherSamples] = []
        self.opening = seconds_of(lambda: made.append(self.samples_of(few)))
        draws = made[0].draws
        taken = min(draws, _LABELS)
        self.share = len(few.examples) * taken / (self.setting.n_train * draws)
        self.computing = seconds_of(lambda: self.blocks.extend(islice(made[0].computed(), taken)))
        self.shapes = {name: tuple(p.shape) for name, p in self.setting.task.named_parameters().items()}

    def seconds(self) -> float:
        """All of it, on all training examples."""
        size = sum(part.stored_bytes() for block in self.blocks for part in block.parts.values())
        passes = 2 if self.corrected and size > KEPT_BYTES * self.share else 1
        layers: dict[Names, LayerFactors] = {}
        added = seconds_of(lambda: self._add(layers))
        each = timed(lambda: eigenpairs(torch.eye(_SIDE).to(self._like))) / _SIDE**3
        decomposed = sum(each * side**3 for layer in layers.values() for side in self._sides(layer))
        measured = 0.0
        if self.corrected:
            for layer in layers.values():
                if layer.sides is not None:
                    layer.basis_out, layer.basis_in = (torch.eye(side).to(self._like) for side in layer.sides)
                    layer.stored_inputs, layer.n_measured = None, 0
            measured = seconds_of(lambda: self._measure(layers))
        return self.opening + (self.computing * passes + added + measured) / self.share + decomposed

    @property
    def _like(self) -> Tensor:
        return next(iter(self.setting.task.named_parameters().values()))

    def _sides(self, layer: LayerFactors) -> list[int]:
        """The sizes of the matrices to decompose: while there are few rows, their Gram matrices."""
        if layer.sides is None:
            return []
        rows = layer.output_moment.count / self.share, layer.input_moment.count / self.share
        return [int(r) if r <= STORED * side else side for r, side in zip(rows, layer.sides, strict=True)]

    def _add(self, layers: dict[Names, LayerFactors]) -> None:
        for block in self.blocks:
            add_block(layers, block, self.shapes, self.corrected)

    def _measure(self, layers: Mapping[Names, LayerFactors]) -> None:
        for block in self.blocks:
            for layer, part in with_parts(layers, block, self.shapes):
                layer.measure(part)


def stand_in(prepare: Callable[[Setting], PreparedCurvature], setting: Setting) -> PreparedCurvature:
    """A curvature prepared on so few examples that it takes no time, in the sizes of that of all.

    Args:
        prepare: of the curvature.
        setting: of the question.
    """
    parts = Samples.of(setting).gradients().parts.items()
    positions = {"|".join(names): part.outputs.shape[1] for names, part in parts if isinstance(part, OuterProducts)}
    most = max(positions.values(), default=1)
    few = first_examples(setting, max(1, min(_EXAMPLES, _ROWS // most)))
    made = prepare(few)
    tensors = dict(made.tensors)
    for key in tensors:
        layer, _, what = key.rpartition("/")
        if what == "eigenvalues":
            _pad(tensors, layer, len(setting.examples) * positions.get(layer, most))
    return PreparedCurvature(tensors, made.diagnostics)


def _pad(tensors: dict[str, Tensor], layer: str, rows: int) -> None:
    """Fills up a layer's bases with zeros to the directions that so many rows have."""
    more = []
    for side in ("out", "in"):
        basis, values = tensors[f"{layer}/basis_{side}"], tensors[f"{layer}/values_{side}"]
        more.append(max(0, min(len(basis), rows) - basis.shape[1]))
        tensors[f"{layer}/basis_{side}"] = F.pad(basis, (0, more[-1]))
        tensors[f"{layer}/values_{side}"] = F.pad(values, (0, more[-1]), value=float(values.min()) * 1e-3)
    tensors[f"{layer}/eigenvalues"] = F.pad(tensors[f"{layer}/eigenvalues"], (0, more[1], 0, more[0]))
