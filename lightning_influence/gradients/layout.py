"""Which dimension of an operation's activations holds the examples of a batch."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Layout(Enum):
    """How the activations of a batch are split into its examples."""

    FIRST = "the first dimension is the example"
    SECOND = "the second dimension is the example (time-major sequences)"
    MAJOR = "the first dimension holds the positions of one example after another (flattened sequences, frames)"
    MINOR = "the first dimension holds one position of all examples after another (flattened time-major)"


class LayoutMismatch(RuntimeError):
    """A tensor's shape does not fit the layout that the self-check found for its operation."""


def fits(shape: tuple[int, ...], examples: int, layout: Layout) -> bool:
    """Whether a tensor with the leading (example and position) dimensions ``shape`` can have this layout."""
    if layout is Layout.FIRST:
        return len(shape) >= 1 and shape[0] == examples
    if layout is Layout.SECOND:
        return len(shape) >= 2 and shape[1] == examples
    return len(shape) >= 1 and shape[0] > examples and shape[0] % examples == 0


@dataclass(frozen=True)
class Split:
    """Splits the activations of a batch into those of its examples.

    Args:
        examples: how many examples the batch has.
        layout: which dimension of the activations holds the examples.
    """

    examples: int
    layout: Layout

    def __call__(self, tensor: Tensor) -> Tensor:
        """View ``tensor`` as [example, position, *rest].

        ``rest`` are the dimensions after the one with the examples (``SECOND``: after the first two).

        Raises:
            LayoutMismatch: the tensor's shape does not fit the layout.
        """
        shape, examples, layout = tuple(tensor.shape), self.examples, self.layout
        if not fits(shape, examples, layout):
            raise LayoutMismatch(
                f"Expected a tensor where {layout.value}, with {examples} examples, got shape {shape}."
            )
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
