"""Lines of code that compute a method's scores after the fit, in any process, with what this fit needs for it."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from lightning_influence.callback.plan import ScoringPlan
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.methods.plain_loss import PlainLoss
from lightning_influence.wording import brief, not_default


def offline_lines(
    run_dir: Path, plan: ScoringPlan, trainer: Any, method: Method | None = None, itself: bool = False
) -> str:
    """An import and three lines of code, with the variables that the script of the fit has.

    Args:
        run_dir: the fit's folder.
        plan: the arguments of ``Influence``.
        trainer: of the fit.
        method: the one that is asked for; None: the first of the plan.
        itself: whether self-influence is asked for.
    """
    method = method if method is not None else next(iter(plan.methods.values()), PlainLoss("all"))
    losses = isinstance(method, PlainLoss)
    names = ["Attributor", "Trajectory", *([] if losses else sorted(set(_classes(method))))]
    data = "trajectory=trajectory, datamodule=datamodule"
    if trainer.datamodule is None:
        data = "train=train_dataloader, trajectory=trajectory"
    top_k = "" if plan.top_k is None else f", top_k={plan.top_k}"
    asked = f"score({brief(method)}, queries={_queries(plan.queries, trainer)}{top_k})"
    if losses or itself:
        asked = "losses(checkpoints='all')" if losses else f"self_influence({brief(method)})"
    return (
        f"  from lightning_influence import {', '.join(names)}\n"
        f"  trajectory = Trajectory.load({str(run_dir)!r})\n"
        f"  attributor = Attributor(model, {data}{_extras(plan, trainer)})\n"
        f"  scores = attributor.{asked}"
    )


def has_no_ids(plan: ScoringPlan, trainer: Any) -> bool:
    """Whether the fit was on a stream without ``sample_id``, of which no lines of code compute scores."""
    return plan.sample_id is None and _is_stream(trainer)


def cheaper(method: Method, itself: bool) -> str:
    """What would cost less than this method does, as the beginning of a sentence that ends in lines of code.

    Args:
        method: as it was asked for.
        itself: whether for self-influence, which has no queries.
    """
    curvature, segments = getattr(method, "curvature", None), getattr(method, "segments", 1)
    ways = [
        "fewer queries" * (not itself),
        "fewer checkpoints (`checkpoints=(-1,)`)" * (getattr(method, "checkpoints", ()) is None),
        f"fewer segments (`segments={segments - 1}`)" * (segments > 1),
        "`EKFAC()` as the curvature" * (curvature is not None and type(curvature).__name__ != "EKFAC"),
        "fewer runs (`runs=1`)" * (getattr(method, "runs", 1) > 1),
        "`hessian=False`" * (getattr(method, "hessian", None) is True),
    ]
    ways = [way for way in ways if way]
    text = f"Pass {' or '.join(ways)}, raise `max_cost`," if ways else "Raise `max_cost`,"
    return f"{text} or score after the fit{'' if itself else ', for instance with `aggregate=' + repr('mean') + '`'}"


def slow_gradients(method: Method, names: Sequence[str]) -> str:
    """A sentence on parameters whose gradients make a method dear; empty where there are none or it takes none.

    Args:
        method: as it was asked for.
        names: of the parameters whose gradients are computed one example at a time.
    """
    if not names or isinstance(method, PlainLoss):
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    # What follows the fit step by step takes all parameters that trained.
    other = "" if method.needs & Evidence.BATCH_ORDER else ", or leave them out by `parameters=`"
    return (
        f" Most of it is `{names[0]}`{more}, whose gradients are computed one example at a time; pad sequences in place"
        f" of packing them{other}."
    )


def _extras(plan: ScoringPlan, trainer: Any) -> str:
    """Arguments of the attributor without which the scores would be others, or on another device."""
    needed = {
        "trainer=trainer": trainer.strategy.root_device.type != "cpu",
        "loss=loss": plan.loss is not None,
        "lookup=lookup": plan.lookup is not None or _is_stream(trainer),
        f"precision={plan.precision!r}": plan.precision is not None,
        f"parameters={list(plan.parameters or ())!r}": plan.parameters is not None,
    }
    return "".join(f", {text}" for text, wanted in needed.items() if wanted)


def _is_stream(trainer: Any) -> bool:
    return isinstance(getattr(trainer.train_dataloader, "dataset", None), IterableDataset)


def _queries(queries: Any, trainer: Any) -> str:
    if not isinstance(queries, str):
        return "val_dataloader" if queries is None else "queries"
    if queries == "train" or trainer.datamodule is not None:
        return repr(queries)
    return f"{queries.partition(':')[0]}_dataloader"


def _classes(value: Any) -> Iterator[str]:
    """The classes of this package in the code of a method."""
    if type(value).__module__.startswith("lightning_influence."):
        yield type(value).__name__
        if dataclasses.is_dataclass(value):
            for _, one in not_default(value):
                yield from _classes(one)
