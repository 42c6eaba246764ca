"""Rules for look-ups in a table: ``embedding``, and ``embedding_bag`` with one bag per example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.layout import Layout, split
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.rule import LayerRule, Operands


def without_padding(ids: Tensor, padding_idx: int | None, rows: int) -> Tensor:
    """Ids with -1 in place of ``padding_idx``."""
    if padding_idx is None:
        return ids
    return torch.where(ids == padding_idx % rows, -1, ids)


class _Embedding:
    def operands(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Operands | None:
        # Both make one example's gradient depend on the other examples of its batch.
        if max_norm is not None or scale_grad_by_freq:
            return None
        return Operands({"weight": weight}, input, input.ndim, {"padding_idx": padding_idx})

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        weight = operands["weight"]
        ids = split(operands.input, examples, layout).reshape(examples, -1)
        ids = without_padding(ids, operands.options["padding_idx"], len(weight))
        outputs = split(gradient, examples, layout).reshape(examples, -1, gradient.shape[-1])
        return {("weight",): Lookup(ids, outputs, tuple(weight.shape))}


class _EmbeddingBag:
    def operands(  # noqa: PLR0913, PLR0917
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Operands | None:
        if input.ndim != 2 or max_norm is not None or scale_grad_by_freq or mode not in ("mean", "sum"):
            return None
        options: dict[str, Any] = {"mode": mode, "weights": per_sample_weights, "padding_idx": padding_idx}
        return Operands({"weight": weight}, input, 1, options)

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        weight, options = operands["weight"], operands.options
        ids = without_padding(operands.input, options["padding_idx"], len(weight))
        outputs = gradient[:, None, :].expand(*ids.shape, -1)
        if options["weights"] is not None:
            outputs = outputs * options["weights"][..., None]
        elif options["mode"] == "mean":
            outputs = outputs / (ids >= 0).sum(1).clamp_min(1)[:, None, None]
        ids = split(ids, examples, layout).reshape(examples, -1)
        outputs = split(outputs, examples, layout).reshape(examples, -1, gradient.shape[-1])
        return {("weight",): Lookup(ids, outputs, tuple(weight.shape))}


EMBEDDINGS: dict[Callable[..., object], LayerRule] = {F.embedding: _Embedding(), F.embedding_bag: _EmbeddingBag()}
