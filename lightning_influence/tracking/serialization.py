"""Per-sample gradients as tensors and builtins, which load with `weights_only=True`."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.convolution import Patches
from lightning_influence.gradients.sum_of_parts import SumOfParts


def encode(gradients: Gradients) -> list[tuple[list[str], dict[str, Any]]]:
    """Convert the parts, by parameter names; tensors are copied to the CPU."""
    return [(list(names), _encoded(part)) for names, part in gradients.parts.items()]


def decode(parts: list[tuple[list[str], dict[str, Any]]], size: int, device: torch.device) -> Gradients:
    """Restore the gradients that were encoded."""
    on_device = tree_map_only(Tensor, lambda tensor: tensor.to(device), parts)
    found: dict[Names, Part] = {tuple(names): _decoded(part) for names, part in on_device}
    return Gradients(found, {}, size)


def _encoded(part: Part) -> dict[str, Any]:
    if isinstance(part, OuterProducts):
        patches = part.patches
        if patches is not None and not isinstance(patches, Patches):
            part, patches = replace(part, source=part.inputs, patches=None), None
        window = None if patches is None else {f.name: getattr(patches, f.name) for f in fields(patches)}
        return {
            "kind": "outer",
            "source": _copied(part.source),
            "outputs": _copied(part.outputs),
            "shape": part.shape,
            "bias": part.bias,
            "transposed": part.transposed,
            "patches": window,
            "factor": None if part.factor is None else _copied(part.factor),
        }
    if isinstance(part, Lookup):
        return {"kind": "lookup", "ids": _copied(part.ids), "outputs": _copied(part.outputs), "shape": part.shape}
    if isinstance(part, SumOfParts):
        return {"kind": "mixed", "terms": [_encoded(term) for term in part.terms]}
    return {"kind": "rows", "rows": [_copied(rows) for rows in part.dense()]}


def _decoded(part: dict[str, Any]) -> Part:
    options = {name: value for name, value in part.items() if name != "kind"}
    if part["kind"] == "outer":
        window = options.pop("patches")
        return OuterProducts(**options, patches=None if window is None else Patches(**window))
    if part["kind"] == "lookup":
        return Lookup(**options)
    if part["kind"] == "mixed":
        return SumOfParts(tuple(_decoded(term) for term in part["terms"]))
    return DenseRows(tuple(part["rows"]))


def _copied(tensor: Any) -> Any:
    return tensor.detach().to("cpu", copy=True).contiguous()
