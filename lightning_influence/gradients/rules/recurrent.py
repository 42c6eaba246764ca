"""Recurrent layers and cells, written as products with their weights, which have a rule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Linear = Callable[..., Tensor]
"""``linear(input, weight, bias=None)``."""
Hidden = tuple[Tensor, ...]
"""The hidden state of a cell: (h,), or (h, c) of an LSTM."""


def _tanh(projected: Tensor, recurrent: Tensor, hidden: Hidden) -> Hidden:
    return ((projected + recurrent).tanh(),)


def _relu(projected: Tensor, recurrent: Tensor, hidden: Hidden) -> Hidden:
    return ((projected + recurrent).relu(),)


def _gru(projected: Tensor, recurrent: Tensor, hidden: Hidden) -> Hidden:
    reset, update, new = projected.chunk(3, -1)
    own_reset, own_update, own_new = recurrent.chunk(3, -1)
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return (new + (update + own_update).sigmoid() * (hidden[0] - new),)


def _lstm(projected: Tensor, recurrent: Tensor, hidden: Hidden) -> Hidden:
    into, forget, cell, out = (projected + recurrent).chunk(4, -1)
    c = forget.sigmoid() * hidden[1] + into.sigmoid() * cell.tanh()
    return out.sigmoid() * c.tanh(), c


_Gates = Callable[[Tensor, Tensor, Hidden], Hidden]
_LAYERS: dict[Callable[..., Any], _Gates] = {
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
    torch.gru: _gru,
    torch.lstm: _lstm,
}
_CELLS: dict[Callable[..., Any], _Gates] = {
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
    torch.gru_cell: _gru,
    torch.lstm_cell: _lstm,
}
RECURRENT = frozenset((*_LAYERS, *_CELLS))
"""The functions that ``unrolled`` covers."""


def unrolled(linear: Linear, func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Compute ``func(*args)`` step by step, with every product with a weight made by ``linear``.

    Returns:
        The result; None for packed sequences, in which examples are sorted by length, and for dropout between layers.
    """
    if func in _CELLS:
        return _cell(linear, func, *args)
    packed = isinstance(args[2], Tensor) or (func is torch.lstm and isinstance(args[1], Tensor))
    return None if packed else _layers(linear, func, *args)


def _cell(
    linear: Linear,
    func: Callable[..., Any],
    input: Tensor,
    hidden: Tensor | Hidden,
    weight_input: Tensor,
    weight_hidden: Tensor,
    bias_input: Tensor | None = None,
    bias_hidden: Tensor | None = None,
) -> Tensor | Hidden:
    hidden = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    projected, recurrent = linear(input, weight_input, bias_input), linear(hidden[0], weight_hidden, bias_hidden)
    found = _CELLS[func](projected, recurrent, hidden)
    return found if func is torch.lstm_cell else found[0]


def _layers(  # noqa: PLR0913, PLR0917 - torch's own signature
    linear: Linear,
    func: Callable[..., Any],
    input: Tensor,
    hidden: Tensor | Hidden,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    if train and dropout > 0:
        return None
    initial: Hidden = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    directions, time = 2 if bidirectional else 1, 1 if batch_first else 0
    each = len(weights) // (layers * directions)
    last: list[Hidden] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            own = _Weights(weights[row * each : (row + 1) * each], has_biases)
            steps = list(own.run(linear, _LAYERS[func], input, tuple(h[row] for h in initial), time, direction == 1))
            last.append(steps[-1])
            outputs.append(torch.stack([step[0] for step in (reversed(steps) if direction else steps)], time))
        input = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    return input, *(torch.stack(states) for states in zip(*last, strict=True))


class _Weights:
    """The weights of one layer in one direction."""

    def __init__(self, weights: Sequence[Tensor], has_biases: bool) -> None:
        self.input, self.hidden = weights[:2]
        biases: Sequence[Tensor | None] = weights[2:4] if has_biases else (None, None)
        self.bias_input, self.bias_hidden = biases
        self.projection = next(iter(weights[4 if has_biases else 2 :]), None)

    def run(
        self, linear: Linear, gates: _Gates, input: Tensor, hidden: Hidden, time: int, backwards: bool
    ) -> Iterator[Hidden]:
        """Yield the hidden state after each step, in the order of computation."""
        projected = linear(input, self.input, self.bias_input).unbind(time)
        for step in reversed(projected) if backwards else projected:
            h, *rest = gates(step, linear(hidden[0], self.hidden, self.bias_hidden), hidden)
            hidden = (h if self.projection is None else linear(h, self.projection), *rest)
            yield hidden
