"""Two copies of an example as a batch, for a ``training_step`` that fails on a batch of one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from lightning_influence.types import Batch


@dataclass(frozen=True)
class Copies:
    """A batch of two copies of one example; its loss is that of the example alone.

    A step that drops every dimension of size one, such as ``net(x).squeeze()``, drops that of the examples as well if
    there is only one.

    Args:
        batch: the two copies, collated.
        share: the part of their loss that belongs to one: 1 if a step returns the mean over its batch, 1/2 if the sum.
    """

    batch: Batch
    share: float

    def with_batch(self, change: Callable[[Batch], Batch]) -> "Copies":
        """The same with a changed batch."""
        return Copies(change(self.batch), self.share)

    def of_one(self, loss: Any) -> Any:
        """What one of the copies contributes to the output of a step, or to the per-sample losses of ``loss=``."""
        if isinstance(loss, Tensor):
            return loss[:1] if loss.ndim else loss * self.share
        return loss


register_pytree_node(Copies, lambda it: ([it.batch], it.share), lambda parts, share: Copies(next(iter(parts)), share))
