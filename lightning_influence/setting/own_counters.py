"""Values that ``training_step`` changes itself, such as a counter of its calls: whether its loss depends on them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.data.examples import Examples
from lightning_influence.devices import wide
from lightning_influence.gradients.index_check import gradient_at
from lightning_influence.module.numbers import put, same, small_values
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.snapshot import holding
from lightning_influence.module.step import NoLoss, set_by_hook
from lightning_influence.module.task import Task
from lightning_influence.module.watched_index import differing_indices
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.trajectory import Trajectory

Gradient = Callable[[Any], Mapping[str, Tensor] | None]
"""Of a few examples, by name, as a function of a number of calls; None without a loss."""

# Calls that are tried of a step with values that do not just count; calls back to which a counter is followed.
_CALLS, _BACK = 3, 1000
# A counter that changes gradients by less than this share, such as that of an average's warm-up, is noted.
_SLOW = 0.1
_WAY_OUT = (
    "Compute it from `batch_idx`, `self.global_step` or `self.current_epoch` instead, which are followed, or pass "
    "`loss=`, a callable (module, batch) -> [batch] of per-sample losses."
)


def note_changing(
    task: Task,
    examples: Examples,
    names: Sequence[str],
    trajectory: Trajectory | None,
    values: Sequence[dict[str, Any]] = (),
) -> list[str]:
    """Sentences on values that change with every batch of a fit, and that the loss may depend on.

    Args:
        task: the module, with final weights.
        examples: of the training set.
        names: of the parameters.
        trajectory: of the fit, if it is known.
        values: the module's before and after a call of the step, see ``small_values``; none: they are found out.

    Raises:
        ValueError: the loss does, in ways that no record follows.
    """
    if task.loss is not None:
        return []
    steps = [0, 0] if trajectory is None else [0, *(checkpoint.step for checkpoint in trajectory.checkpoints)]
    found = check_own_counters(task, examples, names, steps[-1] - steps[-2], values)
    notes = [] if found is None else [found]
    if attributes := set_by_hook(task.module):
        notes.append(
            f"`on_train_batch_start` sets `{attributes[0]}`, and is not called here: the loss is that with its "
            "present value. If the loss depends on it, set it in `training_step`, or pass `loss=`."
        )
    return notes


def check_own_counters(
    task: Task,
    examples: Examples,
    names: Sequence[str],
    back: int | None,
    values: Sequence[dict[str, Any]] = (),
) -> str | None:
    """Whether the loss depends on what the step changes itself; one small pass where it changes nothing.

    Args:
        task: the module, with final weights.
        examples: of the training set.
        names: of the parameters.
        back: steps since the checkpoint before the last one; None: unknown.
        values: the module's before and after a call of the step; none: they are found out.

    Returns:
        A note where averages do, or counters, with which the loss changes slowly.

    Raises:
        ValueError: a counter or switch does.
    """
    task.settle()
    states = list(values) or _states(task, examples, calls=1)
    changed = [path for path in states[0] if not same(states[0][path], states[-1].get(path))]
    if not changed:
        return None
    states += _states(task, examples, calls=_CALLS - 1, start=states[-1])
    changed = [path for path in changed if all(path in state for state in states)]
    exact = [path for path in changed if _is_exact(states[0][path])]
    counters = {path: step for path in exact if (step := _stride(states, path))}
    start = states[0]

    def counted(number: Any) -> dict[str, Any]:
        return {path: start[path] + step * number for path, step in counters.items()}

    def gradient(values: Callable[[Any], Mapping[str, Any]]) -> Gradient:
        return gradient_at(task, examples, names, lambda number: _at(task, values(number)))

    def gradient_with(paths: Sequence[str]) -> Gradient:
        return gradient(lambda call: {path: states[call][path] for path in paths})

    run, which = gradient(counted), list(counters)
    pair = differing_indices(run, _calls(counters, start, back)) if counters else None
    if pair is None and (which := [path for path in exact if path not in counters]):
        run = gradient_with(which)
        pair = differing_indices(run, range(len(states)))
    slow = pair is not None and _gap(run, pair) <= _SLOW
    if pair is not None and not slow:
        raise ValueError(
            f"Expected a loss that does not depend on what `training_step` counts itself, got other gradients at other "
            f"values of {_named(which)}, which each call of the step changes: one call and those around it have "
            f"different losses of the same example. {_WAY_OUT}"
        )
    rest = which if slow else [path for path in changed if path not in exact]
    if slow or (rest and differing_indices(gradient_with(rest), range(len(states)))):
        return (
            f"The loss depends on {_named(rest)}, which each call of `training_step` changes: gradients are taken at "
            "the values of the checkpoints, where they are recorded. Scores are wrong if these vary from step to step."
        )
    return None


def _states(task: Task, examples: Examples, calls: int, start: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The values before and after each of some calls of the step, of which each continues the one before."""
    ids = evenly_spread(len(examples), 5)
    found = [] if start is not None else [small_values(task.module)]
    values: Mapping[str, Any] = start or {}
    try:
        with holding([task], "on_forward", lambda: found.append(small_values(task.module))):
            for _ in range(calls):
                batch = task.to_device(examples.some(ids))
                seed_for(ids[0])
                with _at(task, values), torch.no_grad(), contextlib.suppress(NoLoss):
                    task(batch)
                values = found[-1] if found else {}
    except Exception:  # whoever needs the loss meets the error, and says more about it
        return found[:1] * 2
    return found


@contextlib.contextmanager
def _at(task: Task, values: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the module has these values before the next pass, after which its snapshot puts its own back."""
    task.settle()
    try:
        _set(task.module, values)
        yield
    finally:
        task.restore()


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    put(module, {path: value for path, value in values.items() if not path.endswith(" ")})
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if f"{name} " in values:
                content = torch.tensor(values[f"{name} "]["buffer"], dtype=buffer.dtype, device=buffer.device)
                if not torch.equal(content, buffer):
                    buffer.copy_(content)


def _gap(run: Gradient, pair: tuple[int, int]) -> float:
    """How far the gradients at two calls are apart, as a share of the larger one's length."""
    one, other = run(pair[0]), run(pair[1])
    if one is None or other is None or one.keys() != other.keys():
        return 1.0
    apart = sum(float(wide(one[name] - other[name]).square().sum()) for name in one)
    length = max(sum(float(wide(g).square().sum()) for g in found.values()) for found in (one, other))
    return float((apart / length) ** 0.5) if length else 0.0


def _is_exact(value: Any) -> bool:
    """Whether a value counts or switches, and is no average."""
    entries = next(iter(value.values())) if isinstance(value, dict) else value
    while isinstance(entries, list):
        entries = entries[0] if entries else 0.0
    return not isinstance(entries, float)


def _stride(states: Sequence[Mapping[str, Any]], path: str) -> int:
    """By how much each call raises an integer; 0: not by the same amount."""
    values = [state[path] for state in states]
    if any(type(value) is not int for value in values):
        return 0
    steps = {after - before for before, after in itertools.pairwise(values)}
    return steps.pop() if len(steps) == 1 else 0


def _calls(counters: Mapping[str, int], start: Mapping[str, Any], back: int | None) -> range:
    """Calls since the checkpoint before, the present one is 0; later ones where these are unknown."""
    most = min([_BACK, back or 0, *(start[path] // step for path, step in counters.items())], default=0)
    return range(-most, 1) if most > 0 else range(_CALLS + 1)


def _named(paths: Sequence[str]) -> str:
    names = [f"`{path.strip()}`" for path in paths[:3]]
    return ", ".join(names) + (" and others" if len(paths) > 3 else "")
