"""Looks during a fit for buffers that carry the weights from one step to the losses after it."""

from collections.abc import Iterable

from torch import Tensor

from lightning_influence.module.buffer_paths import candidates, carrying, is_due
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.task import Task
from lightning_influence.types import Batch


class BufferWatch:
    """Looks at the first micro-batch, and at those before which a buffer was written."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[Tensor, int]] | None = None
        self._looked = 0

    def carrier(self, task: Task, trained: Iterable[str], batch: Batch) -> str | None:
        """Name of a buffer through which the weights before this micro-batch change later losses, or None.

        Args:
            task: in the modes of the fit, for batches on the device.
            trained: names of the parameters that the step moves.
            batch: the micro-batch.
        """
        names, buffers = candidates(task), task.named_buffers()
        if self._before is not None and all(
            name in self._before and self._before[name][0] is buffers[name] and self._before[name][1] == version
            for name, version in ((name, buffers[name]._version) for name in names)
        ):
            return None
        self._looked += 1
        found = None
        if names and is_due(self._looked):

            def loss() -> Tensor:
                with isolated_random_state():
                    return task(batch)

            _, found = carrying(task, names, trained, loss)
        self._before = {name: (buffers[name], buffers[name]._version) for name in names}
        return found
