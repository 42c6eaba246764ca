"""Checks of the contract that every method must keep; `check_method` raises, naming the broken promise."""

import contextlib
import logging
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback.influence import Influence
from lightning_influence.compat import LightningModule, Trainer
from lightning_influence.gradients.transforms import ConstantSelfInfluenceError
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.methods.retraining import Retraining
from lightning_influence.refit import Refit
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence

_OFFLINE = Evidence.FINAL_WEIGHTS | Evidence.CHECKPOINTS


class BrokenPromiseError(AssertionError):
    """A method breaks the contract that all methods keep."""


def check_method(method: Method) -> None:
    """Run a method on a small logistic regression and check what users and the driver rely on.

    Methods that need more than checkpoints (batch order, a tracker, retraining) are checked on a short
    fit with a Trainer.

    Raises:
        BrokenPromiseError: a promise is broken; the message names it and what was found.

    Example:
        >>> from lightning_influence import GradientDot
        >>> check_method(GradientDot())
    """
    _check_record(method)
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(Path(folder))
        _check_missing_evidence(method, case)
        if method.needs & ~_OFFLINE:
            _check_after_a_fit(method, case, Path(folder) / "fit")
            return
        _check_scores(method, case)
        _check_self_influence(method, case)


class _Model(LightningModule):  # type: ignore[misc]
    """Multinomial logistic regression."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Case:
    """A model, data, and three checkpoints of gradient descent."""

    def __init__(self, folder: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        self.train = TensorDataset(
            torch.randn(12, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (12,), generator=draw)
        )
        self.queries = Subset(self.train, [2, 5, 7])
        self.model = _Model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1)
        paths = [self._descend(folder / f"{step}.ckpt", step) for step in (1, 2, 3)]
        self.trajectory = Trajectory.from_checkpoints(paths, learning_rates=0.1)

    def _descend(self, path: Path, step: int) -> Path:
        optimizer = self.model.configure_optimizers()
        self.model.training_step(self.train[:], 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {"state_dict": self.model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        torch.save(state | {"global_step": step, "epoch": step}, path)
        return path

    def attributor(self, train: Dataset[Any] | None = None, batch_size: int | None = None) -> Attributor:
        return Attributor(self.model, train or self.train, self.trajectory, batch_size=batch_size)


def _promise(promise: str, kept: bool, found: object) -> None:
    if not kept:
        raise BrokenPromiseError(f"Promise broken: {promise}. Got {found}.")


def _same(promise: str, first: Tensor, second: Tensor) -> None:
    scale = max(float(first.abs().max()), 1e-300)
    worst = float((first - second).abs().max()) / scale
    _promise(promise, worst <= 1e-8, f"a difference of {worst:.2g} of the largest score")


def _check_record(method: Method) -> None:
    _promise("a method is an instance of `Method`", isinstance(method, Method), repr(method))
    _promise("a method is a dataclass", is_dataclass(method), type(method).__name__)
    for parameter in fields(method):  # type: ignore[arg-type]
        try:
            setattr(method, parameter.name, getattr(method, parameter.name))
        except FrozenInstanceError:
            break
        raise BrokenPromiseError(f"Promise broken: a method is a frozen record. Got a settable `{parameter.name}`.")
    plain = all(parameter.name != "needs" for parameter in fields(method))  # type: ignore[arg-type]
    _promise(
        "`needs` is no hyper-parameter", plain, "a field: write `needs = ...` or `needs: ClassVar[Evidence] = ...`"
    )
    _promise("`needs` is an Evidence", isinstance(method.needs, Evidence), repr(method.needs))
    copy = pickle.loads(pickle.dumps(method))
    _promise("a method survives pickling", copy == method and hash(copy) == hash(method), repr(copy))


def _check_missing_evidence(method: Method, case: _Case) -> None:
    if not method.needs & ~Evidence.FINAL_WEIGHTS:
        return
    bare = Attributor(case.model, case.train)
    try:
        bare.score(method, case.queries)
    except MissingEvidence:
        return
    raise BrokenPromiseError("Promise broken: missing evidence is refused with `MissingEvidence`. Got scores.")


def _check_scores(method: Method, case: _Case) -> None:
    before = _state(case.model)
    values = _scores(method, case.attributor(), case.queries)
    _promise("the module is left as it was", _state(case.model) == before, "other weights, modes or random state")
    _promise("scores are [query, train]", values.shape == (3, 12), list(values.shape))
    _promise("scores are finite", bool(values.isfinite().all()), values)
    _same("two calls agree", values, _scores(method, case.attributor(), case.queries))
    for size in (1, 5):
        again = _scores(method, case.attributor(None, size), case.queries)
        _same("scores do not depend on the batch size", values, again)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = _scores(method, case.attributor(Subset(case.train, order.tolist())), case.queries)
    _same("permuting the training set permutes columns", values[:, order], shuffled)
    alone = [_scores(method, case.attributor(), Subset(case.queries, [i])) for i in range(3)]
    _same("the scores of a query do not depend on the other queries", values, torch.cat(alone))
    own = values[torch.arange(3), torch.tensor(case.queries.indices)]
    _promise("a duplicate of the query is a proponent", bool((own > 0).all()), own.tolist())


def _check_after_a_fit(method: Method, case: _Case, folder: Path) -> None:
    """Two epochs in batches of one, which every kind of method can follow."""
    methods = [method] if method.needs & Evidence.TRACKER else []
    influence = Influence(methods, case.queries, folder, max_cost=1e9, log_scores=False)
    with torch.random.fork_rng(), _silent():
        torch.manual_seed(0)
        module = _Model()
        _trainer(influence).fit(module, DataLoader(case.train, shuffle=True))
    refit = Refit(dirpath=folder / "models") if method.needs & Evidence.REFIT else None
    attributor = Attributor(module, case.train, influence.trajectory, refit=refit)
    before = _state(module)
    values = _scores(method, attributor, case.queries)
    _promise("the module is left as it was", _state(module) == before, "other weights, modes or random state")
    scored = method.scored(12)
    _promise("scores are [query, scored]", values.shape == (3, 12 if scored is None else len(scored)), values.shape)
    known = values[~values.isnan()] if isinstance(method, Retraining) else values
    _promise("scores are finite", bool(known.isfinite().all()) and known.numel() > 0, values)
    _same("two calls agree", values.nan_to_num(), _scores(method, attributor, case.queries).nan_to_num())
    if methods:
        _same("scores at the end of the fit are those of later", influence.scores[method.name].values, values)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Lightning says nothing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _trainer(influence: Influence) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=[influence], **quiet)


def _check_self_influence(method: Method, case: _Case) -> None:
    try:
        values = case.attributor().self_influence(method).values
    except (NotImplementedError, ConstantSelfInfluenceError):
        return
    _promise("self-influence is [train]", values.shape == (12,), list(values.shape))
    pairwise = _scores(method, case.attributor(), case.train).diagonal()
    _same("self-influence is the score of an example on itself", pairwise, values)


def _scores(method: Method, attributor: Attributor, queries: Dataset[Any]) -> Tensor:
    return attributor.score(method, queries).values.double()


def _state(model: nn.Module) -> list[Any]:
    read: Callable[[Tensor], Any] = lambda tensor: tensor.detach().flatten().tolist()  # noqa: E731
    weights = [(name, read(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return [weights, [m.training for m in model.modules()], read(torch.get_rng_state())]
