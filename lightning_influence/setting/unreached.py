"""Parameters that trained, though the loss does not depend on them in eval mode, in which examples are scored."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from lightning_influence.data.examples import Block, Examples
from lightning_influence.gradients import Engine
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.precise import precise
from lightning_influence.gradients.reduction import PASS_LOSS
from lightning_influence.module.snapshot import restoring
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.setting.checkpoints import put_in_place
from lightning_influence.trajectory import Trajectory

_SAMPLED = 8


@dataclass(frozen=True)
class Unreached:
    """What is known of parameters that the loss in eval mode does not depend on.

    Args:
        error: why examples cannot be scored by gradients in eval mode; None if they can.
        note: a doubt that stays; None if there is none.
    """

    error: str | None = None
    note: str | None = None

    @classmethod
    def of(cls, engine: Engine, examples: Examples, trajectory: Trajectory | None) -> "Unreached":
        """Find out whether parameters without a gradient in eval mode have one in training, or moved in the fit.

        Args:
            engine: at the last checkpoint's weights, which are in place again afterwards.
            examples: the training dataset.
            trajectory: of the fit; None if it is not known.
        """
        plan = engine.plan
        without = (*plan.unreached, *plan.zero)
        if not without:
            return cls()
        sample = examples.chosen(evenly_spread(len(examples), _SAMPLED))
        in_training = _reached(engine, sample, without, training=True)
        in_training -= _reached(engine, sample, in_training) if in_training else set()
        if in_training:
            cause = "though it depends on them in training mode (`self.training`)"
            return cls(error=_error(plan.names, sorted(in_training), cause))
        if trajectory is not None and plan.unreached:
            moved = _moved(trajectory, plan.unreached)
            moved -= _reached_elsewhere(engine, sample, moved, trajectory)
            for block in examples.blocks() if moved else ():  # rare examples may reach them
                moved -= _reached(engine, block, moved)
                if not moved:
                    break
            driven = {name for name in moved if _has_state(trajectory, name)}
            if driven and engine.task.loss is None:
                return cls(error=_error(plan.names, sorted(driven), "though the fit trained them"))
            if moved:
                return cls(note=_note(sorted(moved)))
        if len(plan.unreached) == len(plan.names):
            return cls(error=_error(plan.names, sorted(plan.unreached), "so that all scores would be 0"))
        return cls()


def refuse_all_unreached(engine: Engine, measured: bool, known: str | None) -> None:
    """Raise if the queries' loss or measurement depends on no parameter.

    Args:
        engine: of the queries.
        measured: whether a measurement takes the place of their loss.
        known: the error for the training examples, if there is one.

    Raises:
        ValueError: it depends on none.
    """
    if len(engine.plan.unreached) == len(engine.plan.names):
        if known is not None and not measured:
            raise ValueError(known)
        what, example = ("measurement", " such as an accuracy") if measured else ("loss", "")
        raise ValueError(
            f"Expected the queries' {what} to have gradients by the parameters in eval mode, got a {what}{example} "
            f"without any, so that all scores would be 0. Pass {'another' if measured else 'a `loss=` or'} "
            "`measurement=`, a callable (module, batch) -> [batch], which is differentiable."
        )


def _error(names: Sequence[str], found: Sequence[str], cause: str) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    shown = ", ".join(f"`{name}`" for name in found[:3]) + more
    leave = "" if len(found) == len(names) else ", or leave these parameters out by `parameters=`"
    return (
        f"Expected the loss in eval mode, in which examples are scored, to depend on all parameters that trained, got "
        f"no gradient for {shown}, {cause}. {PASS_LOSS}, which runs the same code in eval mode{leave}."
    )


def _note(found: Sequence[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"The fit moved {', '.join(f'`{name}`' for name in found[:3])}{more}, on which the loss depends neither in "
        "eval nor in training mode: what examples did to them is not in the scores."
    )


def _reached(engine: Engine, block: Block, names: Iterable[str], training: bool = False) -> set[str]:
    """The parameters by which a block's loss has a gradient other than 0; none if it does not run in this mode."""
    if training:  # at weights of their own, into which the step may write
        with precise(engine.task, None) as task, _in_training(task.module), contextlib.suppress(Exception):
            return _reached(replace(engine, task=task), block, names)
        return set()  # a mode in which the module does not run on these examples
    names = list(names)
    parameters = engine.task.named_parameters(names)
    with requiring_gradients(engine.task.module, names):
        total = engine.total(block)
        if not total.requires_grad:
            return set()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return {name for name, g in pairs if g is not None and bool(g.to_dense().any())}


@contextlib.contextmanager
def _in_training(module: nn.Module) -> Iterator[None]:
    """Training mode, but for dropout and normalisation, which change gradients without a change of what is trained."""
    with restoring(module.modules(), "training"):
        for part in module.modules():
            part.training = not isinstance(part, (_NormBase, _DropoutNd))
        yield


def _moved(trajectory: Trajectory, names: Sequence[str]) -> set[str]:
    """The parameters that differ between the first and the last checkpoint by more than weight decay explains."""
    first, last = (trajectory.checkpoints[i].load().parameters for i in (0, -1))
    found = set()
    for name in names:
        if name in first and name in last:
            a, b = first[name].double().flatten(), last[name].double().flatten()
            shrunk = a * (a @ b / (a @ a)) if len(a) > 1 and bool(a.any()) else a
            if float((b - shrunk).norm()) > 1e-5 * float(a.norm()):
                found.add(name)
    return found


def _has_state(trajectory: Trajectory, name: str) -> bool:
    """Whether the optimizer made steps by gradients of a parameter, as its moments or momentum show."""
    state = trajectory.checkpoints[-1].load().optimizer.get(name, {})
    return any(key != "step" and bool(value.any()) for key, value in state.items())


def _reached_elsewhere(engine: Engine, sample: Block, names: set[str], trajectory: Trajectory) -> set[str]:
    """Those among some parameters that the loss in eval mode depends on at another checkpoint."""
    found: set[str] = set()
    if not names:
        return found
    for checkpoint in [*trajectory.checkpoints[:-1], trajectory.checkpoints[-1]]:
        put_in_place(engine.task, checkpoint)
        found |= _reached(engine, sample, names)
    return found
