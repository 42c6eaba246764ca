"""Attributes that people look for in the wrong place, or know from other libraries: where they are here."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


class Hinted:
    """A base of public classes whose error about a missing attribute says where to look."""

    if not TYPE_CHECKING:  # a type checker that saw it would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, which names what was probably meant."""
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property whose own error is of this kind
            known = next((ELSEWHERE[kind.__name__] for kind in type(self).__mro__ if kind.__name__ in ELSEWHERE), {})
            close = difflib.get_close_matches(name, [other for other in dir(self) if other[:1] != "_"], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            hint = f" Use {known[name].format(name)}." if name in known else hint
            # Without `name`, to which Python would add a guess of its own.
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}.{hint}", name=None, obj=None
            )
