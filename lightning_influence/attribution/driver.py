"""The driver's loops: blocks of queries × tiles of training examples, a method in the middle, a sink at the end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.attribution.accumulators import GroupSink, NonFinite, Sink
from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine, Gradients
from lightning_influence.methods.method import Method
from lightning_influence.progress import progress
from lightning_influence.setting.session import AllQueries, Session, whole_blocks
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed
from lightning_influence.trajectory import Trajectory

# Scores held at once while they are summed over checkpoints.
_TILE = 2**25


def setting_of(session: Session, trajectory: Trajectory | None, batches_per_epoch: int | None) -> Setting:
    """The setting of a session, its tile being all training examples."""
    every = range(len(session.examples))
    return Setting(session.engine, session.examples, every, trajectory, batches_per_epoch, session.models)


def run_scores(method: Method, setting: Setting, asked: AllQueries, sink: Sink, sign: float, trainer: Any) -> None:
    """Scores every query against every training example, tile by tile, into ``sink``.

    Raises:
        ValueError: scores of another shape than promised, or gradients that are not finite.
    """
    block, columns = tiling(method, setting, asked)
    n_train, n_queries = setting.n_train, len(asked)
    visits = n_train * stages_of(method, setting.trajectory) * -(-n_queries // block)
    bad = NonFinite()
    with progress(trainer, visits, type(method).__name__) as done:
        setting.on_block = done
        for first in range(0, n_queries, block):
            queries = asked[first : first + block]
            for start in range(0, n_train, columns):
                setting.ids = range(start, min(start + columns, n_train))
                tile = method.score(setting, queries)
                _check_shape(method, tile, len(queries), len(setting.ids))
                if method.unknowns or bad.clean(tile, first, start):
                    tile, column = _scored(tile, start, method.scored(n_train))
                    sink.take(tile if sign > 0 else -tile, first, column)
    bad.refuse()


def run_group(method: Method, setting: Setting, asked: AllQueries, ids: Sequence[int], trainer: Any) -> Tensor:
    """[query]: the method's own estimate for a group, or the sum of its scores.

    Raises:
        ValueError: gradients that are not finite.
    """
    block, _ = tiling(method, setting, asked)
    found = []
    for first in range(0, len(asked), block):
        values = method.group(setting, asked[first : first + block], ids)
        if values is None:
            scored = method.scored(setting.n_train)
            columns = ids if scored is None else torch.searchsorted(torch.as_tensor(scored), torch.as_tensor(ids))
            sink = GroupSink(len(asked), torch.as_tensor(columns).tolist())
            run_scores(method, setting, asked, sink, 1.0, trainer)
            return sink.total
        found.append(values)
    total = torch.cat(found)
    bad = NonFinite()
    bad.queries = (~total.isfinite()).nonzero()[:, 0].tolist()
    bad.refuse()
    return total


def run_self_influence(method: Method, setting: Setting, trainer: Any) -> Tensor:
    """[train]: self-influence of every training example.

    Raises:
        ValueError: gradients that are not finite.
    """
    with progress(trainer, setting.n_train * stages_of(method, setting.trajectory), "self-influence") as done:
        setting.on_block = done
        values = method.self_influence(setting).cpu()
    bad = NonFinite()
    bad.train = [] if method.unknowns else (~values.isfinite()).nonzero()[:, 0].tolist()
    bad.refuse()
    return values


def estimate(method: Method, session: Session, setting: Setting) -> float:
    """Seconds that a run will take, by timing one block of each side: its self-check is already behind us."""
    engine, examples, asked = session.engine, session.examples, session.asked
    block = next(iter(examples.blocks(0, min(len(examples), examples.block_size))))
    blocks = len(examples) / block.size
    if method.whole:
        with torch.no_grad():
            seconds = timed(lambda: engine.task(engine.task.to_device(block.batch))) * blocks
        return seconds * (2 if asked is None else 1 + len(asked) / len(examples))
    if asked is None:
        seconds = timed(lambda: _pass(engine, block).norm2()) * blocks
    else:
        held, columns = tiling(method, setting, asked)
        own = method.seconds(setting, asked[:held])
        if own is not None:
            return own * len(asked) / min(held, len(asked))
        some = asked[: min(held, asked.examples.block_size)]
        gradients = some.gradients()
        share = len(asked) / len(some)
        backward = timed(lambda: _pass(engine, block))
        product = max(0.0, timed(lambda: gradients.dot(engine.gradients(block))) - backward)
        passes, tiles = -(-len(asked) // held), -(-len(examples) // columns)
        seconds = (backward * passes + product * share) * blocks + timed(some.gradients) * share * tiles
    beside = method.overhead(setting, len(examples) if asked is None else len(asked))
    return (seconds + beside) * stages_of(method, setting.trajectory)


def _pass(engine: Engine, block: Block) -> Gradients:
    """Gradients of a block; where a method takes none, the loss alone."""
    if not engine.plan.names:
        engine.task(engine.task.to_device(block.batch))
    return engine.gradients(block)


def stages_of(method: Method, trajectory: Trajectory | None) -> int:
    """How many sets of weights a method looks at."""
    return max(1, len(method.positions(trajectory)))


def tiling(method: Method, setting: Setting, asked: AllQueries) -> tuple[int, int]:
    """Queries per block, and training examples per tile (whole blocks of the dataset)."""
    if method.whole:
        return max(1, _TILE // setting.n_train), setting.n_train
    block, size = asked.block(), setting.examples.block_size
    most = method.at_once(setting)
    if most is not None:
        block = min(block, whole_blocks(max(1, most), asked.examples.block_size))
    if method.walks:
        return max(1, min(block, _TILE // setting.n_train)), setting.n_train
    return block, max(1, _TILE // min(block, len(asked)) // size) * size


def _scored(tile: Tensor, start: int, ids: Sequence[int] | None) -> tuple[Tensor, int]:
    """The columns of a tile that have a score, and how many lie before it."""
    if ids is None:
        return tile, start
    kept = torch.as_tensor(ids)
    inside = kept[(kept >= start) & (kept < start + tile.shape[1])] - start
    return tile[:, inside.to(tile.device)], int((kept < start).sum())


def _check_shape(method: Method, tile: Tensor, n_queries: int, n_train: int) -> None:
    if tile.shape != (n_queries, n_train):
        raise ValueError(
            f"Expected `{type(method).__name__}.score` to return [query, train] = {[n_queries, n_train]}, "
            f"got {list(tile.shape)}."
        )
