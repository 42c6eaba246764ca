"""The processes of a Trainer: shares of work, sums and lists over all of them, and errors that all of them raise."""

import contextlib
import functools
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """Another process failed with an error that cannot be sent to this one."""


class Processes:
    """One process that works alone. Every call returns at once with what is at hand.

    Args:
        rank: of this process.
        count: of the processes that share the work.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def share(self, n: int) -> range:
        """This process's part of the positions 0 to n - 1: consecutive ones, in the order of the ranks.

        All of them where there are fewer positions than processes, since some would have none.
        """
        if not self.shares(n):
            return range(n)
        return range(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def shares(self, n: int) -> bool:
        """Whether n positions are divided among several processes."""
        return 1 < self.count <= n

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks.

        Raises:
            Exception: the error of another process, which failed instead.
        """
        return [value]

    def joined(self, part: Tensor, n: int, dim: int = 0) -> Tensor:
        """The parts of all processes, whose sizes along a dimension are their shares of n, as one tensor."""
        return torch.cat(self.gathered(part), dim) if self.shares(n) else part

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape."""
        return tensor

    def dealt(self, costs: Sequence[float]) -> list[int]:
        """The rank that does each piece of work, so that all have about as much to do."""
        loads, ranks = [0.0] * self.count, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            ranks[piece] = loads.index(min(loads))
            loads[ranks[piece]] += costs[piece]
        return ranks

    def from_rank(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """The tensor of the process of a rank, on the device of this one's, whatever the others have."""
        return tensor

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do: they wait for each other at its end, and an error of one is raised in all."""
        yield


class _Group(Processes):
    """Processes that are connected by ``torch.distributed``.

    Every exchange carries the error of a process that cannot go on. One that fails sends it in place of what the
    others are waiting for, so that exchanges stay in step and nobody waits for a process that will not come.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self._depth = 0
        self._known: BaseException | None = None  # the error that all processes have heard of

    def gathered(self, value: T) -> list[T]:
        return self._exchanged(value)

    def summed(self, tensor: Tensor) -> Tensor:
        with _whole():
            self._exchanged(None)  # nobody has failed
            total = tensor.clone()
            torch.distributed.all_reduce(total)
        return total

    def from_rank(self, tensor: Tensor, rank: int = 0) -> Tensor:
        with _whole():
            self._exchanged(None)
            sent = [tensor.cpu() if self.rank == rank else None]  # by way of the CPU: each process has its own device
            torch.distributed.broadcast_object_list(sent, src=rank)
        return tensor if self.rank == rank or sent[0] is None else sent[0].to(tensor.device)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if error is not self._known and not isinstance(error, GeneratorExit):
                self._exchanged(None, error)
            raise
        else:
            self._exchanged(None)
        finally:
            self._depth -= 1
            if not self._depth:
                self._known = None

    def _exchanged(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """The values of all processes. Raises the error of the lowest rank that has one."""
        everyone: list[Any] = [None] * self.count
        with _whole():
            torch.distributed.all_gather_object(everyone, (value, None if error is None else _packed(error)))
            for rank, (_, packed) in enumerate(everyone):
                if packed is not None:
                    self._known = error if rank == self.rank and error is not None else _unpacked(packed, rank)
                    raise self._known
        return [value for value, _ in everyone]


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits for the end of an exchange, of which a process that leaves half-way spoils the next one for all.

    It is forgotten where the exchange brings the error of another process, which ends the work in any case.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[Any, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for number, frame in came[:1]:
        handler(number, frame)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Code in it takes this process for the only one, as metrics must that would wait for processes at other work."""
    if not connected():
        yield
        return
    known, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = known


def connected() -> bool:
    """Whether this process is connected to others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def processes_of(trainer: Any) -> Processes:
    """The processes of a Trainer that trains in several, if they are connected now; otherwise this one alone."""
    count = getattr(trainer, "world_size", 1)
    if count == 1 or not connected() or torch.distributed.get_world_size() != count:
        return Processes()
    return _group(torch.distributed.get_rank(), count)


@functools.cache  # one object, which knows whether something is being done together
def _group(rank: int, count: int) -> _Group:
    return _Group(rank, count)


def _packed(error: BaseException) -> bytes | str:
    """An error to send; its text, if that is all that can be sent."""
    with contextlib.suppress(Exception):
        packed = pickle.dumps(error)
        pickle.loads(packed)
        return packed
    return f"{type(error).__name__}: {error}"


def _unpacked(packed: bytes | str, rank: int) -> BaseException:
    if isinstance(packed, str):
        return OtherProcessFailed(f"Process {rank} failed with {packed}")
    try:
        return pickle.loads(packed)
    except Exception as error:
        return OtherProcessFailed(f"Process {rank} failed with an error that cannot be read here: {error}")
