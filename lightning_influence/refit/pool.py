"""Trains many models, in this process or by joblib; survives failures and dead workers."""

import pickle
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_influence.refit.store import TrainedModel
from lightning_influence.wording import counted

Job = tuple[Tensor, int]
"""Membership and seed of a model to train."""

# The pool may break down this often in a row without finishing a model.
_BREAKDOWNS = 3
# Raised where the job cannot be sent to a worker, which no other worker would help against.
_UNSENDABLE = (pickle.PicklingError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Failure:
    """A model that could not be trained."""

    job: Job
    cause: str


def train_all(
    train: Callable[[Tensor, int], TrainedModel],
    jobs: Sequence[Job],
    n_jobs: int | None,
    take: Callable[[TrainedModel], None],
) -> list[Failure]:
    """Trains every job, passes each model to ``take`` as soon as it is finished, and retries failures once.

    Args:
        train: called with membership and seed, here or in another process.
        jobs: what to train.
        n_jobs: processes; None: those of a ``joblib.parallel_config`` around the call, otherwise only this process.
        take: stores a model.

    Returns:
        The jobs that failed twice.

    Raises:
        RuntimeError: the pool keeps breaking down.
        ImportError: ``n_jobs`` asks for processes and joblib is not installed.
    """
    waiting, tries, breakdowns = dict(enumerate(jobs)), Counter[int](), 0
    lost: list[Failure] = []
    while waiting:
        results = _results(train, list(waiting.items()), n_jobs)
        while True:
            try:
                index, result = next(results)
            except StopIteration:
                break
            except _UNSENDABLE:
                raise
            except Exception as error:
                breakdowns += 1
                _breakdown(error, breakdowns, len(waiting))
                break
            if isinstance(result, TrainedModel):
                take(result)
                breakdowns = 0
                del waiting[index]
                continue
            tries[index] += 1
            if tries[index] == 2:
                lost.append(result)
                del waiting[index]
            else:
                warnings.warn(f"{described(result)} It is tried once more.", stacklevel=2)
    return lost


def _breakdown(error: Exception, breakdowns: int, left: int) -> None:
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if breakdowns >= _BREAKDOWNS:
        raise RuntimeError(
            f"Expected workers that train, got {counted(breakdowns, 'breakdown')} of the pool without a finished model "
            f"({cause}). {counted(left, 'model', 'is')} left; finished ones are kept. Check the memory of the workers, "
            "or train with `n_jobs=1`."
        ) from error
    warnings.warn(f"A worker was lost ({cause}): its models are trained again.", stacklevel=3)


def _results(
    train: Callable[[Tensor, int], TrainedModel], jobs: Sequence[tuple[int, Job]], n_jobs: int | None
) -> Iterator[tuple[int, TrainedModel | Failure]]:
    """Each job's number with its model or failure, in the order in which they finish."""
    if not _parallel(n_jobs):
        for index, job in jobs:
            yield _one(train, index, job)
        return
    try:
        import joblib
    except ImportError as error:
        raise ImportError(
            '`n_jobs` needs joblib. Run `pip install "lightning-influence[parallel]"`, or train with `n_jobs=1`.'
        ) from error
    tasks = [joblib.delayed(_one)(train, index, job) for index, job in jobs]
    if joblib.parallel.get_active_backend()[0].supports_return_generator:
        yield from joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)(tasks)
        return
    wave = 2 * joblib.effective_n_jobs(n_jobs)  # Ray returns no result before all are done
    with joblib.Parallel(n_jobs=n_jobs, batch_size=1) as pool:
        for first in range(0, len(tasks), wave):
            yield from pool(tasks[first : first + wave])


def _parallel(n_jobs: int | None) -> bool:
    """Whether to train by joblib: ``n_jobs`` asks for processes, or the user's ``parallel_config`` sets a backend."""
    if n_jobs is not None or "joblib" not in sys.modules:
        return n_jobs not in (None, 1)
    from joblib.parallel import get_active_backend

    backend, active = get_active_backend()
    return active != 1 or type(backend).__name__ not in ("LokyBackend", "SequentialBackend")


def workers(n_jobs: int | None) -> int:
    """How many models are trained at the same time."""
    if not _parallel(n_jobs):
        return 1
    import joblib

    return int(joblib.effective_n_jobs(n_jobs))


def _one(train: Callable[[Tensor, int], TrainedModel], index: int, job: Job) -> tuple[int, TrainedModel | Failure]:
    """A model, or its failure: an exception would end the other jobs."""
    try:
        return index, train(*job)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {error}"
        return index, Failure(job, cause)


def described(failure: Failure) -> str:
    """One sentence: which model failed, and why."""
    membership, seed = failure.job
    out = (~membership).nonzero()[:, 0].tolist()
    what = f"without {out}" if len(out) <= 5 else f"on {int(membership.sum())} of {len(membership)} examples"
    return f"The model {what} (seed {seed}) failed with {failure.cause}"
