"""Loops over blocks of queries and tiles of training examples, in which a method computes the scores."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.attribution.accumulators import (
    Accumulator,
    GroupAccumulator,
    MatrixAccumulator,
    NonFinite,
    Share,
)
from lightning_influence.attribution.finished import Finished
from lightning_influence.attribution.magnitude import note_impossible
from lightning_influence.attribution.out_of_memory import in_memory
from lightning_influence.methods.kinds import ForwardOnly, GradientProduct, StageSums, WholeRun
from lightning_influence.methods.method import Method
from lightning_influence.methods.retraining import Retraining
from lightning_influence.processes import Processes
from lightning_influence.progress import progress
from lightning_influence.setting.setting import Queries, Setting


def run_scores(
    method: Method,
    setting: Setting,
    queries: Queries,
    accumulator: Accumulator,
    trainer: Any,
    finished: Finished,
) -> None:
    """Score every training example for every query, tile by tile, into an accumulator.

    Args:
        method: computes the scores.
        setting: the question.
        queries: all queries.
        accumulator: receives the scores.
        trainer: shows the progress, or None.
        finished: follows what is final; a negative ``sign`` flips the scores, for a measurement that is better when
            higher.

    Raises:
        ValueError: scores of another shape than [query, train]; gradients that are not finite.
    """
    block, columns = method.tile(setting, queries)
    n_train, share = setting.n_train, share_of(method, setting, len(queries))
    visits = len(share.train) * _visited(method, setting) * -(-len(share.queries) // block)
    bad, largest = NonFinite(), torch.zeros(len(queries))
    keep_all = isinstance(accumulator, MatrixAccumulator)
    finished.sums = setting.state("sums", StageSums)
    setting.progress = functools.partial(progress, trainer)
    # Of divided queries each process may have another number of blocks.
    together = Processes() if share.divided == 0 else setting.processes
    with progress(trainer, visits, method.name) as done:
        setting.on_block = done
        for first in range(share.queries.start, share.queries.stop, block):
            some = queries[first : min(first + block, share.queries.stop)]
            finished.held, finished.train = len(some), 0
            for ids in share.tiles(columns, setting.processes.count):
                setting.ids, start = ids, ids.start
                tile = in_memory(functools.partial(_tile, method, setting, some, keep_all), setting, together)
                clean = isinstance(method, Retraining) or bad.clean(tile, first, start)  # their NaN is an unknown score
                rows, largest = slice(first, first + len(some)), largest.to(tile)
                largest[rows] = torch.maximum(largest[rows], tile.abs().amax(1))
                tile, column = _scored(tile, start, method.scored(n_train))
                if clean or keep_all:
                    accumulator.add(tile if finished.sign > 0 else -tile, first, column)
                finished.gaps |= not clean
                finished.train = column + tile.shape[1]
            finished.queries = first + len(some)
    bad.refuse(setting.processes)
    if share.divided is not None:  # what is noted is decided by the scores of all processes
        largest = torch.stack(setting.processes.gathered(largest.cpu())).amax(0)
    _note_vanished(method, setting, int((largest == 0).sum()))
    if not (queries.mean or queries.measured):
        note_impossible(method, setting, queries.engine, queries.examples, largest)
    accumulator.merge(share, setting.processes)
    _join_notes(setting)


def _tile(method: Method, setting: Setting, queries: Queries, on_host: bool) -> Tensor:
    """The scores of a tile, [query, train]; on the host, where a device's errors have all been raised.

    Raises:
        ValueError: scores of another shape.
    """
    tile, expected = method.score(setting, queries), [len(queries), len(setting.ids)]
    if list(tile.shape) != expected:
        raise ValueError(
            f"Expected `{method.name}.score` to return [query, train] = {expected}, got {list(tile.shape)}."
        )
    return tile.cpu() if on_host else tile


def _note_vanished(method: Method, setting: Setting, count: int) -> None:
    """Note how many queries have no score other than 0, in a precision in which their gradients may be too small."""
    if count and setting.zeros().dtype is torch.float32 and not isinstance(method, (ForwardOnly, Retraining)):
        setting.diagnostic("queries_without_scores", count)
        setting.note(
            f"Queries with a score of 0 for every training example: {count}. Their gradients vanish, or the model is "
            "so certain of them that the scores are smaller than float32 holds: `module.double()` has those."
        )


def run_group(method: Method, setting: Setting, queries: Queries, ids: Sequence[int], trainer: Any) -> Tensor:
    """The joint influence of a group, [query]: the method's own estimate, or else the sum of its scores.

    Raises:
        ValueError: gradients that are not finite.
    """
    block, setting.progress = method.tile(setting, queries).queries, functools.partial(progress, trainer)
    found = []
    for first in range(0, len(queries), block):
        some = queries[first : first + block]
        values = in_memory(functools.partial(method.group, setting, some, ids), setting, setting.processes)
        if values is None:
            scored = method.scored(setting.n_train)
            columns = ids if scored is None else torch.searchsorted(torch.as_tensor(scored), torch.as_tensor(ids))
            accumulator = GroupAccumulator(len(queries), torch.as_tensor(columns).tolist())
            run_scores(method, setting, queries, accumulator, trainer, Finished())
            return accumulator.total
        found.append(values)
    total = torch.cat(found)
    NonFinite(queries=(~total.isfinite()).nonzero()[:, 0].tolist()).refuse(setting.processes)
    return total


def run_self_influence(method: Method, setting: Setting, trainer: Any, finished: Finished) -> Tensor:
    """The self-influence of every training example that the method scores, [scored].

    Args:
        method: computes it.
        setting: the question.
        trainer: shows the progress, or None.
        finished: follows what is final.

    Raises:
        ValueError: gradients that are not finite.
    """
    finished.sums = setting.state("sums", StageSums)
    setting.progress = functools.partial(progress, trainer)
    if isinstance(method, GradientProduct):
        setting.ids = setting.processes.share(setting.n_train)
    visits = len(setting.ids) * _visited(method, setting)
    with progress(trainer, visits, f"{method.name}: {method.quantity}") as done:
        setting.on_block = done
        values = in_memory(lambda: method.self_influence(setting).cpu(), setting, setting.processes)
    if isinstance(method, GradientProduct):
        values = setting.processes.joined(values, setting.n_train)
    note_impossible(method, setting, setting.engine, setting.examples, values.abs())
    _join_notes(setting)
    scored = method.scored(setting.n_train)
    ids = torch.arange(len(values)) if scored is None else torch.as_tensor(scored)
    values = values[ids]
    if not isinstance(method, Retraining):
        finished.sums = StageSums(None, values)
        bad = ids[~values.isfinite()].tolist()
        NonFinite(bad, of="losses" if method.quantity == "loss" else "gradients").refuse(setting.processes)
    return values


def share_of(method: Method, setting: Setting, n_queries: int) -> Share:
    """What this process computes: some training examples, or some queries where a method needs the whole training set.

    Everything where models are retrained: the processes share the models, and decide by all queries which to train.
    """
    train, queries = range(setting.n_train), range(n_queries)
    if isinstance(method, Retraining):
        pass
    elif isinstance(method, (WholeRun, ForwardOnly)):
        queries = setting.processes.share(n_queries)
    elif method.scored(setting.n_train) is None:
        train = setting.processes.share(setting.n_train)
    return Share(queries, train, (n_queries, setting.n_train))


def _join_notes(setting: Setting) -> None:
    """Notes and diagnostics of all processes, which have seen different examples."""
    for notes, diagnostics in setting.processes.gathered((setting.notes, setting.diagnostics)):
        for note in notes:
            setting.note(note)
        for name, value in diagnostics.items():
            setting.diagnostic(name, value)


def _visited(method: Method, setting: Setting) -> int:
    """How many checkpoints are visited for each block of queries; 1 without a trajectory."""
    return max(1, len(method.positions(setting.trajectory)))


def _scored(tile: Tensor, start: int, ids: Sequence[int] | None) -> tuple[Tensor, int]:
    """The columns of a tile that have scores, and how many training examples before the tile have."""
    if ids is None:
        return tile, start
    every = torch.as_tensor(ids)
    inside = every[(every >= start) & (every < start + tile.shape[1])] - start
    return tile[:, inside.to(tile.device)], int((every < start).sum())
