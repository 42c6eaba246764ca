"""Attributes and arguments that people look for in the wrong place or know from other libraries: what they are here."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

_TABLE = "`to_pandas()`"
_ITSELF = "these are single numbers of training examples, see `influence.scores[name]` for queries"
_LABELS = "`influence.self_scores[name].top(k)`, of `Influence(self_influence=True)` or `labels=True`"

ELSEWHERE: dict[str, Mapping[str, str]] = {
    "Scores": {
        "top": "`proponents(k)` and `opponents(k)`",
        "topk": "`proponents(k)` and `opponents(k)`",
        "ids": "`train_ids` and `query_ids`",
        "scores": "`values`",
        "self_influence": _LABELS,
        "self_scores": _LABELS,
        "losses": "`influence.attributor.losses()`",
        "explain": "`plot(query)`",
        "to_csv": f"{_TABLE}.to_csv(path)",
        "to_parquet": f"{_TABLE}.to_parquet(path)",
        "df": _TABLE,
        "name": "`method`",
        "shape": "`values.shape`",
    },
    "SelfScores": {
        "proponents": f"`top(k)`: {_ITSELF}",
        "opponents": f"`top(k)`: {_ITSELF}",
        "topk": "`top(k)`",
        "group": "`influence.scores[name].group(ids)`",
        "query_ids": f"`train_ids`: {_ITSELF}",
        "ids": "`train_ids`",
        "scores": "`values`",
        "to_csv": f"{_TABLE}.to_csv(path)",
        "to_parquet": f"{_TABLE}.to_parquet(path)",
        "df": _TABLE,
        "name": "`method`",
        "shape": "`values.shape`",
    },
    "TopK": {"values": "`scores`", "indices": "`train_ids`", "query_id": "`query_ids`"},
    "Results": {
        name: f"that of one method: `influence.scores[name].{name}`"
        for name in (
            "proponents",
            "opponents",
            "plot",
            "plot_classes",
            "report",
            "to_pandas",
            "to_arrow",
            "log",
            "group",
        )
    }
    | {"top": _LABELS, "save": "that of one method: `influence.scores[name].save(path)`"},
    "Influence": {
        name: f"`influence.attributor.{name}(method, ...)`" for name in ("score", "group", "cost", "estimate")
    }
    | {
        "losses": "`influence.attributor.losses()`",
        "proponents": "`influence.scores[name].proponents(k)`",
        "opponents": "`influence.scores[name].opponents(k)`",
        "top": _LABELS,
        "report": "`influence.scores[name].report(path)`",
        "plot": "`influence.scores[name].plot(query)`",
        "checkpoints": "`influence.trajectory.checkpoints`",
    },
    "Attributor": {
        **dict.fromkeys(("attribute", "influence", "explain", "scores", "compute"), "`score(method, queries)`"),
        **dict.fromkeys(("proponents", "opponents", "plot", "report"), "a method of what `score` returns"),
        "self_scores": "`self_influence(method)`",
        "bank": "`attributor.refit.bank(queries, ...)`, with `Attributor(refit=Refit())`",
        "labels": "`losses(checkpoints='all')`",
        "refit": "`Attributor(..., refit=Refit())`, which has it",
    },
    "Trajectory": {
        **dict.fromkeys(("score", "self_influence", "losses"), "`Attributor(model, train, trajectory).{}`"),
        "scores": "`Scores.load(path)`, of a file in `scores/` of the run's folder",
    },
}
"""By the name of a class: what is looked for in it, and what to use."""


_DATA = ("train", "queries", "data")
_QUERIES, _IDS = ("queries", "query", "data"), ("ids", "query", "examples")
_PATH, _ITERATIONS = ("path", "dirpath"), ("max_iterations", "depth", "steps")
_COUNT = ("k", "top_k", "n_models", "n_subsets", "n_seeds")
OTHER_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("k", "n", "topk", "top_k", "count", "limit", "number"), _COUNT),
    **dict.fromkeys(("model", "net", "network", "lightning_module", "pl_module"), ("module", "make_module")),
    **dict.fromkeys(("dataset", "dataloader", "loader", "dataloaders"), _DATA),
    **dict.fromkeys(("train_data", "train_loader", "train_set", "training_data", "x_train"), _DATA[:1]),
    **dict.fromkeys(("test", "val", "test_dataset", "test_data", "val_dataset", "x_test", "targets"), _QUERIES),
    **dict.fromkeys(("id", "idx", "index", "indices", "sample", "example", "train_id", "query_id"), _IDS),
    **dict.fromkeys(("file", "filename", "output", "out", "folder", "root", "save_dir", "directory"), _PATH),
    **dict.fromkeys(("ckpt", "ckpt_path", "ckpts", "run", "run_dir"), ("weights", "trajectory", "checkpoints")),
    **dict.fromkeys(("criterion", "loss_fn", "objective"), ("loss", "measurement")),
    **dict.fromkeys(("target_fn", "function", "metric"), ("measurement",)),
    **dict.fromkeys(("device", "accelerator", "devices"), ("trainer",)),
    "dtype": ("precision",),
    "lr": ("learning_rates",),
    **dict.fromkeys(("layers", "params", "param_names"), ("parameters",)),
    **dict.fromkeys(("lambda_", "lam", "regularization", "regularisation", "l2"), ("damping", "weight_decay")),
    **dict.fromkeys(("n_iter", "max_iter", "iterations", "num_iterations", "recursion_depth"), _ITERATIONS),
    **dict.fromkeys(("hvp", "ihvp", "solver", "inverse", "hessian_method"), ("curvature",)),
    **dict.fromkeys(("mean", "std", "transform", "denormalize", "unnormalize"), ("normalization",)),
    **dict.fromkeys(("class_names", "classes", "names", "label_names"), ("labels",)),
    **dict.fromkeys(("show", "draw", "to_image", "decode", "image"), ("render",)),
    **dict.fromkeys(("features", "feature_names"), ("columns",)),
    **dict.fromkeys(("num_models", "n_subsets", "num_subsets"), ("n_models", "n_subsets")),
    **dict.fromkeys(("callback", "estimator", "name", "algorithm"), ("method", "methods")),
    **dict.fromkeys(("logger", "trainer"), ("loggers",)),
    **dict.fromkeys(("max_seconds", "budget", "max_time", "time_limit"), ("max_cost",)),
}
"""By an argument's name elsewhere: those that it may have here, of which a function has at most a few."""


F = TypeVar("F", bound=Callable[..., Any])


def meant(name: str, known: Iterable[str]) -> str:
    """Which of the known arguments was probably meant, or all of them, in a sentence."""
    known = list(known)
    other = [word for word in OTHER_WORDS.get(name.lower(), ()) if word in known]
    close = other or difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"It takes {', '.join(f'`{word}`' for word in known)}." if known else "It takes none."


def _wrong(function: Callable[..., Any], called: str, arguments: tuple[Any, ...], keywords: Any) -> TypeError | None:
    """The error about a keyword that a function does not take, or has already, with what was probably meant.

    Args:
        function: with ``self`` as its first argument, if it is a method.
        called: its name for a user.
        arguments: by position.
        keywords: by name.
    """
    parameters = inspect.signature(function).parameters
    names = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    by_position = names[: len(arguments)]
    public = [name for name in names if name not in ("self", "cls") and name[:1] != "_"]
    for name in keywords:
        if name in by_position:
            return TypeError(
                f"Expected `{name}` of `{called}` once, got it by position and by name. Its arguments are, in this "
                f"order, {', '.join(f'`{word}`' for word in public)}."
            )
        if name not in names and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
            return TypeError(f"Expected an argument of `{called}`, got `{name}`. {meant(name, public)}")
    return None


def hinted(function: F) -> F:
    """Decorate a public function, so that its error about a keyword says what was probably meant."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except TypeError:
            wrong = _wrong(function, function.__qualname__.removesuffix(".__new__"), arguments, keywords)
            if wrong is None:
                raise
        raise wrong

    return call  # type: ignore[return-value]


class HintedArguments:
    """A base of public classes whose constructors' errors about a keyword say what was probably meant."""

    if not TYPE_CHECKING:  # a type checker that saw it would accept any arguments

        def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
            """Raises TypeError for keywords that ``__init__`` does not take."""
            made = super().__new__(cls)
            if keywords and (wrong := _wrong(cls.__init__, cls.__name__, (made, *arguments), keywords)) is not None:
                raise wrong
            return made


class Hinted(HintedArguments):
    """A base of public classes whose errors about a missing attribute or a wrong keyword say what to use."""

    def __init_subclass__(cls) -> None:
        """Public methods of its own are ``hinted``; not those that another base, such as Lightning's, has."""
        super().__init_subclass__()
        for name, one in list(vars(cls).items()):
            function = one.__func__ if isinstance(one, classmethod) else one
            if name[:1] == "_" or not isinstance(function, FunctionType) or hasattr(super(cls, cls), name):
                continue
            setattr(cls, name, classmethod(hinted(function)) if isinstance(one, classmethod) else hinted(function))

    if not TYPE_CHECKING:  # a type checker that saw it would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, which names what was probably meant."""
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property whose own error is of this kind
            known = next((ELSEWHERE[kind.__name__] for kind in type(self).__mro__ if kind.__name__ in ELSEWHERE), {})
            close = difflib.get_close_matches(name, [other for other in dir(self) if other[:1] != "_"], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            hint = f" Use {known[name].format(name)}." if name in known else hint
            hint = f" Use `[{name!r}]`." if isinstance(self, Mapping) and name in self else hint
            # Without `name`, to which Python would add a guess of its own.
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}.{hint}", name=None, obj=None
            )
