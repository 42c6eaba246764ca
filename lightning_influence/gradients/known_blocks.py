"""What checks of blocks found at the same weights, also for earlier questions."""

import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.devices import read_numbers, wide, widest

if TYPE_CHECKING:
    from lightning_influence.gradients.engine import Computed, Engine

# Of a block's longest gradients, so many are looked at.
_LONGEST = 4
# Blocks that are remembered, at most.
_BLOCKS = 2**16


@dataclass
class KnownBlocks:
    """Remembers, by the sums of the module's weights, which blocks need no check again."""

    _version: int = -1
    _weights: int = 0
    _lengths: dict[int, float] = field(default_factory=dict)
    _added: set[tuple[int, int, float]] = field(default_factory=set)

    def again(self) -> "KnownBlocks":
        """The same for a later question."""
        return KnownBlocks(_lengths=dict(self._lengths), _added=copy.copy(self._added))

    def longest(self, engine: "Engine", computed: "Computed") -> set[int]:
        """The rows with the longest gradients, if none before at these weights was as long.

        A step that reads numbers may treat them otherwise, such as a loss above a limit.
        """
        lengths = [part.norm2() for part in computed.parts.values()]
        if not lengths or lengths[0].is_complex():
            return set()
        each = torch.stack([wide(x) for x in lengths]).sum(0).nan_to_num(0.0)
        longest = each.topk(min(_LONGEST, len(each)))
        weights = self._at(engine)
        known = self._lengths.get(weights, 0.0)
        values, indices = read_numbers([longest.values, longest.indices])
        rows = {int(row): length for row, length in zip(indices, values, strict=True) if length > known}
        self._lengths[weights] = max([known, *rows.values()])
        return set(rows)

    def add_up(self, engine: "Engine", block: Block, total: Tensor | None) -> bool:
        """Whether the losses of these examples were found to add up to this one, at these weights."""
        return total is not None and self._key(engine, block, total) in self._added

    def note(self, engine: "Engine", block: Block, total: Tensor | None) -> None:
        """Note that they do."""
        if total is not None and len(self._added) < _BLOCKS:
            self._added.add(self._key(engine, block, total))

    def _key(self, engine: "Engine", block: Block, total: Tensor) -> tuple[int, int, float]:
        ids = block.ids if isinstance(block.ids, range) else tuple(block.ids)
        return self._at(engine), hash(ids), float(total)

    def _at(self, engine: "Engine") -> int:
        """A digest of the weights in place and of buffers, which every question puts there anew."""
        if self._version != engine.task.version:
            module = engine.task.module
            held = [t.detach() for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()]
            self._version = engine.task.version
            self._weights = hash(tuple(chain.from_iterable(read_numbers([widest(t).sum() for t in held]))))
        return self._weights
