"""Opens a question with what its method needs."""

import contextlib
from collections.abc import Iterator

from lightning_influence import timing
from lightning_influence.attribution.arguments import check_batch_index
from lightning_influence.data.source import Source
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.module.precision import full_products
from lightning_influence.module.task import Loss
from lightning_influence.processes import Processes
from lightning_influence.progress import telling
from lightning_influence.refit import Refit
from lightning_influence.setting.session import Session
from lightning_influence.setting.setting import Setting


@contextlib.contextmanager
def opened(
    session: Session,
    method: Method,
    queries: Source | None,
    measurement: Loss | None,
    mean: bool,
    refit: Refit | None,
    processes: Processes,
    limit_seconds: float | None,
) -> Iterator[Setting]:
    """The context of a question.

    Args:
        session: has the module, its data and the weights that the method works on.
        method: a plan of gradients is made unless it takes none; retrained models are there if it needs them.
        queries: None for self-influence.
        measurement: takes the place of the queries' loss.
        mean: whether the mean over all queries counts as one query.
        refit: retrains models, or None.
        processes: answer it together.
        limit_seconds: after which solvers stop, in a single process; None: when they are done.
    """
    # Rounding to TF32 is multiplied where equations are solved.
    products = full_products() if hasattr(method, "curvature") else contextlib.nullcontext()
    with products, contextlib.ExitStack() as stack:
        with telling(session.trainer, f"{method.name}: checking the data, the module and its gradients"):
            setting = stack.enter_context(session.open(queries, measurement, mean, not isinstance(method, ForwardOnly)))
        if refit is not None and method.needs & Evidence.REFIT:
            setting.models = refit.models
        if refit is not None and queries is not None:
            refit.asked = queries
        setting.processes = processes
        check_batch_index(method, setting)
        if limit_seconds is not None and processes.count == 1:  # several might stop at different places
            setting.deadline = timing.clock() + limit_seconds
        yield setting
