"""The loss of an example alone: two copies of it where a batch of one fails, and the likely cause where none works."""

import contextlib
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples, alike
from lightning_influence.devices import wide
from lightning_influence.gradients.reduction import WAY_OUT, NoRelation
from lightning_influence.gradients.reduction_probe import Probed, probe
from lightning_influence.gradients.sample import Sample
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.snapshot import restoring
from lightning_influence.module.task import Task
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import tensors_in

# Examples of the batches in which the cause of a refusal is sought.
_TRIED = 5
_PACKAGE = Path(__file__).parents[1]
_STACK = (
    "MixUp and masking cannot be divided among the examples: pass `train=` as a DataLoader whose `collate_fn` only "
    "stacks; the scores are then about the examples as they are."
)
_IN_TRAINING = f"{WAY_OUT} It may switch layers to train mode; their modes are restored after each pass."


def probe_examples(
    task: Task, examples: Examples, names: Sequence[str] = (), also: Sequence[int] = ()
) -> tuple[Probed, Sample]:
    """Find how a batch's loss follows from its examples' losses, see ``probe``.

    Where a batch of one fails, ``examples.share_of_copies`` is set: two copies of an example then stand for it.

    Args:
        task: the module with its loss.
        examples: the dataset.
        names: parameters whose gradients will be taken.
        also: examples to compare besides those that are evenly spread.

    Returns:
        What was found, and the examples with their passes, for further checks.

    Raises:
        ValueError: no such relation was found; the message names the likely cause.
    """
    if examples.collate_draws(_some(examples)):
        raise ValueError(f"Expected a `collate_fn` that stacks examples, got one that draws random numbers. {_STACK}")
    try:
        return _probe(task, examples, names, also)
    except Exception as error:
        for share in (1.0, 0.5):
            examples.share_of_copies = share
            with contextlib.suppress(Exception):
                return _probe(task, examples, names, also)
        examples.share_of_copies = None
        _refuse(task, examples, error)
        raise


def _probe(task: Task, examples: Examples, names: Sequence[str], also: Sequence[int]) -> tuple[Probed, Sample]:
    sample = Sample(task, examples, names)
    found = probe(sample, also)
    if names or task.loss is not None:  # some losses fail on a batch of one in the backward pass only
        sample.alone(sample.ids[0])
    return found, sample


def _refuse(task: Task, examples: Examples, error: Exception) -> None:
    """Raise an error that names the cause of another, if it can be found."""
    ours = str(error).startswith("Expected `training_step`")
    found = f"{type(error).__name__}: {str(error).partition('. Pass')[0].rstrip('.')}"
    if isinstance(error, NoRelation):
        cause = _mixing(task, examples)
        if cause is not None:
            raise NoRelation(f"{error.found} {cause}") from error
    elif task.loss is None and (ours or not _is_of_this_package(error)):
        if _returns_loss_in_training(task, examples):
            raise TypeError(
                f"Expected `training_step` to return its loss in eval mode, in which scores are computed, got a loss "
                f"in train mode only; in eval mode: {found}. {_IN_TRAINING}"
            ) from error
        if not ours:
            raise ValueError(
                f"Expected `training_step` to run in eval mode on a batch of one example (or of two copies of it), got "
                f"{found}. {WAY_OUT}"
            ) from error


def _is_of_this_package(error: Exception) -> bool:
    """Whether an error was raised here, with a cause and a way out; torch's own may begin with "Expected", too."""
    frames = traceback.extract_tb(error.__traceback__)
    # a mode that watches torch's functions calls them in the place of the user's code
    return bool(frames) and _PACKAGE in Path(frames[-1].filename).parents and frames[-1].name != "called"


def _returns_loss_in_training(task: Task, examples: Examples) -> bool:
    with contextlib.suppress(Exception):  # the error is about one example or its reading, not about the mode
        task(task.to_device(examples.some(_some(examples))))
        return False
    buffers = list(task.module.buffers())
    with restoring(task.module.modules(), "training"), restoring(buffers, "data"):
        for buffer in buffers:  # normalisation layers update theirs without a change of the version counters
            buffer.data = buffer.data.clone()
        task.module.train()
        try:
            task(task.to_device(examples.some(_some(examples))))
        except Exception:
            return False
    return True


def _mixing(task: Task, examples: Examples) -> str | None:
    """Why the loss of a batch is not made of its examples' losses, and the way out; None if that is not found."""
    ids = _some(examples)
    if len(ids) < 2:
        return None
    if _collate_mixes(examples, ids):
        return (
            "The `collate_fn` changes an example by the others in its batch (CutMix, normalisation over the batch). "
            f"{_STACK}"
        )
    if not alike(*(_moved(task, examples, ids, seed) for seed in (0, 1))):
        return (
            "The hooks of the batch transfer draw random numbers. Let them draw only where `self.training` (of the "
            "LightningModule) is True: it is False while scores are computed, unlike `self.trainer.training`."
        )
    with _BroadcastWatch(len(ids)) as watch:
        losses = [_loss(task, examples, ids, seed) for seed in (0, 1)]
    if watch.found is not None:
        first, second, name = watch.found
        return (
            f"`{name}` was given tensors of shapes {first} and {second}, which it broadcasts to pairs of all examples: "
            "each prediction is compared with every target, in training as well. Give both the same shape, for "
            "instance with `squeeze(1)` or `unsqueeze(1)`, and train again."
        )
    if losses[0] != losses[1]:
        return (
            "It draws random numbers in eval mode, such as a functional dropout without `training=`, the sample of a "
            "VAE (`randn_like`, `rsample`) or MixUp in the step. Draw them only `if self.training`, which "
            f"leaves the fit as it is; or: {WAY_OUT}"
        )
    return _form_of(task, examples, ids)


def _form_of(task: Task, examples: Examples, ids: Sequence[int]) -> str | None:
    """What a loss without random numbers computes of its batch, where that is one of two common forms."""
    singles = [_loss(task, examples, [i], 0) for i in ids]
    sizes = range(2, len(ids) + 1)
    joint = [_loss(task, examples, ids[:n], 0) for n in sizes]
    scale = max(map(abs, singles))
    # of a term that each batch of one has as well, a sum of n losses has n - 1 too many
    terms = [(sum(singles[:n]) - loss) / (n - 1) for n, loss in zip(sizes, joint, strict=True)]
    if max(terms) - min(terms) <= 1e-4 * scale and len(terms) > 1:
        return (
            f"It is a sum over the examples plus a term that counts once a batch, whatever its size ({terms[-1]:.6g}), "
            f"such as a penalty on the weights, which no single example has. {WAY_OUT} Leave that term out of it."
        )
    roots = [math.sqrt(sum(s * s for s in singles[:n]) / n) for n in sizes]
    if all(abs(root - loss) <= 1e-4 * scale for root, loss in zip(roots, joint, strict=True)):
        return (
            "It is the root of a mean of squares over the batch (RMSE), in which an example weighs by the others' "
            f"errors. {WAY_OUT} Squared errors are."
        )
    return None


def _collate_mixes(examples: Examples, ids: Sequence[int]) -> bool:
    """Whether an example's rows in a collated batch differ from those that it has alone; padding aside."""
    together = tensors_in(examples.some(ids))
    for row, example in enumerate(ids):
        alone = tensors_in(examples.one(example))
        for joint, single in zip(together, alone, strict=False):
            if joint.ndim != single.ndim or joint.ndim == 0 or len(joint) != len(ids) or len(single) != 1:
                continue
            common = tuple(slice(min(a, b)) for a, b in zip(joint.shape[1:], single.shape[1:], strict=True))
            if not torch.equal(joint[row][common], single[0][common]):
                return not bool(joint.isnan().any())
    return False


def _moved(task: Task, examples: Examples, ids: Sequence[int], seed: int) -> Any:
    """The batch as the step gets it, under a random state of its own."""
    batch = examples.some(ids)
    seed_for(ids[0], seed=seed)
    return task.to_device(batch)


def _loss(task: Task, examples: Examples, ids: Sequence[int], seed: int) -> float:
    batch = _moved(task, examples, ids, 0)
    seed_for(ids[0], seed=seed)
    return float(wide(task(batch).detach()).sum())


def _some(examples: Examples) -> list[int]:
    return list(evenly_spread(len(examples), _TRIED))


class _BroadcastWatch(FunctionWatch):
    """Finds an operation that broadcasts [batch, 1] against [batch] to [batch, batch].

    Args:
        examples: the number of examples in the batch.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples
        self.found: tuple[tuple[int, ...], tuple[int, ...], str] | None = None

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and follow a call."""
        tensors = [tuple(a.shape) for a in args[:2] if isinstance(a, Tensor)]
        if self.found is None and len(tensors) == 2 and set(tensors) == {(self.examples,), (self.examples, 1)}:
            self.found = tensors[0], tensors[1], getattr(func, "__name__", str(func)).strip("_")
        return func(*args, **kwargs)
