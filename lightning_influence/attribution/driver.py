"""Loops over blocks of queries and tiles of training examples, in which a method computes the scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.attribution.accumulators import Accumulator, GroupAccumulator, MatrixAccumulator, NonFinite
from lightning_influence.attribution.finished import Finished
from lightning_influence.methods.kinds import StageSums
from lightning_influence.methods.method import Method
from lightning_influence.methods.retraining import Retraining
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
    n_train, n_queries = setting.n_train, len(queries)
    visits = n_train * _visited(method, setting) * -(-n_queries // block)
    bad = NonFinite()
    finished.sums = setting.state("sums", StageSums)
    setting.progress = partial(progress, trainer)
    with progress(trainer, visits, method.name) as done:
        setting.on_block = done
        for first in range(0, n_queries, block):
            some = queries[first : first + block]
            finished.held, finished.train = len(some), 0
            for start in range(0, n_train, columns):
                setting.ids = range(start, min(start + columns, n_train))
                tile = method.score(setting, some)
                expected = [len(some), len(setting.ids)]
                if list(tile.shape) != expected:
                    raise ValueError(
                        f"Expected `{method.name}.score` to return [query, train] = {expected}, got {list(tile.shape)}."
                    )
                clean = isinstance(method, Retraining) or bad.clean(tile, first, start)  # their NaN is an unknown score
                tile, column = _scored(tile, start, method.scored(n_train))
                if clean or isinstance(accumulator, MatrixAccumulator):
                    accumulator.add(tile if finished.sign > 0 else -tile, first, column)
                finished.gaps |= not clean
                finished.train = column + tile.shape[1]
            finished.queries = first + len(some)
    bad.refuse()


def run_group(method: Method, setting: Setting, queries: Queries, ids: Sequence[int], trainer: Any) -> Tensor:
    """The joint influence of a group, [query]: the method's own estimate, or else the sum of its scores.

    Raises:
        ValueError: gradients that are not finite.
    """
    block, setting.progress = method.tile(setting, queries).queries, partial(progress, trainer)
    found = []
    for first in range(0, len(queries), block):
        values = method.group(setting, queries[first : first + block], ids)
        if values is None:
            scored = method.scored(setting.n_train)
            columns = ids if scored is None else torch.searchsorted(torch.as_tensor(scored), torch.as_tensor(ids))
            accumulator = GroupAccumulator(len(queries), torch.as_tensor(columns).tolist())
            run_scores(method, setting, queries, accumulator, trainer, Finished())
            return accumulator.total
        found.append(values)
    total = torch.cat(found)
    NonFinite(queries=(~total.isfinite()).nonzero()[:, 0].tolist()).refuse()
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
    setting.progress = partial(progress, trainer)
    with progress(trainer, setting.n_train * _visited(method, setting), f"{method.name}: self-influence") as done:
        setting.on_block = done
        values = method.self_influence(setting).cpu()
    scored = method.scored(setting.n_train)
    ids = torch.arange(len(values)) if scored is None else torch.as_tensor(scored)
    values = values[ids]
    if not isinstance(method, Retraining):
        finished.sums = StageSums(None, values)
        NonFinite(train=ids[~values.isfinite()].tolist()).refuse()
    return values


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
