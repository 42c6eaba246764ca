"""Which dimension of an operation's activations holds the examples of a batch."""

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


def split(tensor: Tensor, examples: int, layout: Layout) -> Tensor:
    """View ``tensor`` as [example, position, *rest].

    ``rest`` are the dimensions after the one with the examples (``SECOND``: after the first two).

    Raises:
        LayoutMismatch: the tensor's shape does not fit the layout.
    """
    if not fits(tuple(tensor.shape), examples, layout):
        raise LayoutMismatch(
            f"Expected a tensor where {layout.value}, with {examples} examples, got shape {tuple(tensor.shape)}."
        )
    if layout is Layout.FIRST:
        return tensor.unsqueeze(1)
    if layout is Layout.SECOND:
        return tensor.transpose(0, 1)
    rest = tensor.shape[1:]
    if layout is Layout.MAJOR:
        return tensor.reshape(examples, -1, *rest)
    return tensor.reshape(-1, examples, *rest).transpose(0, 1)
