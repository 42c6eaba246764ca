"""Rules for look-ups in a table: ``embedding``, and ``embedding_bag`` with one bag per example."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts, arguments


def without_padding(ids: Tensor, padding_idx: int | None, rows: int) -> Tensor:
    """Ids with -1 in place of ``padding_idx``."""
    if padding_idx is None:
        return ids
    return torch.where(ids == padding_idx % rows, -1, ids)


def _mixes_examples(given: Mapping[str, Any]) -> bool:
    """Whether one example's gradient depends on the other examples of its batch."""
    return given["max_norm"] is not None or given["scale_grad_by_freq"]


class _Embedding:
    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        given = arguments(F.embedding, args, kwargs)
        if _mixes_examples(given):
            return None
        return Operands({"weight": given["weight"]}, given["input"], given["input"].ndim, given)

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        weight = operands["weight"]
        ids = without_padding(operands.input, operands.options["padding_idx"], len(weight))
        return {("weight",): Lookup(split.positions(ids, 0), split.positions(gradient), tuple(weight.shape))}


class _EmbeddingBag:
    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        given = arguments(F.embedding_bag, args, kwargs)
        if given["input"].ndim != 2 or _mixes_examples(given) or given["mode"] not in ("mean", "sum"):
            return None
        return Operands({"weight": given["weight"]}, given["input"], 1, given)

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        weight, options = operands["weight"], operands.options
        ids = without_padding(operands.input, options["padding_idx"], len(weight))
        outputs = gradient[:, None, :].expand(*ids.shape, -1)
        if options["per_sample_weights"] is not None:
            outputs = outputs * options["per_sample_weights"][..., None]
        elif options["mode"] == "mean":
            outputs = outputs / (ids >= 0).sum(1).clamp_min(1)[:, None, None]
        return {("weight",): Lookup(split.positions(ids, 0), split.positions(outputs), tuple(weight.shape))}


EMBEDDINGS: dict[Callable[..., object], LayerRule] = {F.embedding: _Embedding(), F.embedding_bag: _EmbeddingBag()}
