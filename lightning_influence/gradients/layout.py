"""Which dimension of an operation's activations holds the examples of a batch."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Layout(Enum):
    """How the activations of a batch are split into its examples."""

    FIRST = "the first dimension is the example"
    SECOND = "the second dimension is the example (time-major sequences)"
    MAJOR = "the first dimension holds the positions of one example after another (flattened sequences, frames)"
    MINOR = "the first dimension holds one position of all examples after another (flattened time-major)"
    OF_MAJOR = "rows are taken by index out of the positions of one example after another (tokens of an expert)"
    OF_MINOR = "rows are taken by index out of one position of all examples after another"


BY_INDEX = {Layout.OF_MAJOR: Layout.MAJOR, Layout.OF_MINOR: Layout.MINOR}
"""Layouts of rows that were taken by index, with those of what they were taken from."""


class LayoutMismatch(RuntimeError):
    """A tensor's shape does not fit the layout that the self-check found for its operation."""


@dataclass(frozen=True, eq=False)
class Taken:
    """Rows that were taken by index out of others, of which each example may have another number.

    Args:
        index: [row]: which of the others each is.
        total: how many others there were.
    """

    index: Tensor
    total: int
    _places: dict[tuple[int, Layout], tuple[Tensor, Tensor, int]] = field(default_factory=dict, repr=False)

    def __getitem__(self, rows: slice | Tensor) -> "Taken":
        return Taken(self.index[rows], self.total)

    def places(self, examples: int, layout: Layout) -> tuple[Tensor, Tensor, int]:
        """The example of each row, its place among the rows of that example, and how many places there are."""
        key = examples, layout
        if key not in self._places:
            each = self.total // examples
            owner = self.index // each if layout is Layout.OF_MAJOR else self.index % examples
            counts = owner.new_zeros(examples).index_add_(0, owner, torch.ones_like(owner))
            order = owner.argsort(stable=True)
            place = torch.empty_like(owner)
            start = counts.cumsum(0) - counts
            place[order] = torch.arange(len(owner), device=owner.device) - start[owner[order]]
            self._places[key] = owner, place, max(1, int(counts.max()))
        return self._places[key]


def fits(shape: tuple[int, ...], examples: int, layout: Layout, taken: Taken | None = None) -> bool:
    """Whether a tensor with the leading (example and position) dimensions ``shape`` can have this layout."""
    if layout is Layout.FIRST:
        return len(shape) >= 1 and shape[0] == examples
    if layout is Layout.SECOND:
        return len(shape) >= 2 and shape[1] == examples
    if layout in BY_INDEX and taken is not None:
        return len(shape) >= 1 and shape[0] == len(taken.index) and taken.total % examples == 0
    return len(shape) >= 1 and (shape[0] > examples or layout in BY_INDEX) and shape[0] % examples == 0


@dataclass(frozen=True)
class Split:
    """Splits the activations of a batch into those of its examples.

    Args:
        examples: how many examples the batch has.
        layout: which dimension of the activations holds the examples.
        taken: which rows they are, if they were taken by index.
    """

    examples: int
    layout: Layout
    taken: Taken | None = None

    @property
    def padded(self) -> bool:
        """Whether examples with fewer positions than others have zeros behind them."""
        return self.taken is not None and self.layout in BY_INDEX

    def of(self, rows: slice) -> "Split":
        """The same for some of the rows that were taken by index."""
        return Split(self.examples, self.layout, None if self.taken is None else self.taken[rows])

    def __call__(self, tensor: Tensor) -> Tensor:
        """View ``tensor`` as [example, position, *rest].

        ``rest`` are the dimensions after the one with the examples (``SECOND``: after the first two).

        Raises:
            LayoutMismatch: the tensor's shape does not fit the layout.
        """
        shape, examples, layout = tuple(tensor.shape), self.examples, self.layout
        if not fits(shape, examples, layout, self.taken):
            raise LayoutMismatch(
                f"Expected a tensor where {layout.value}, with {examples} examples, got shape {shape}."
            )
        if self.taken is not None and layout in BY_INDEX:
            owner, place, most = self.taken.places(examples, layout)
            found = tensor.new_zeros(examples, most, *shape[1:])
            found[owner, place] = tensor
            return found
        layout = BY_INDEX.get(layout, layout)
        if layout is Layout.FIRST:
            return tensor.unsqueeze(1)
        if layout is Layout.SECOND:
            return tensor.transpose(0, 1)
        if layout is Layout.MAJOR:
            return tensor.reshape(examples, -1, *shape[1:])
        return tensor.reshape(-1, examples, *shape[1:]).transpose(0, 1)

    def positions(self, tensor: Tensor, features: int = 1) -> Tensor:
        """[example, position, *features], where the features are that many trailing dimensions."""
        return self(tensor).reshape(self.examples, -1, *tensor.shape[tensor.ndim - features :])
