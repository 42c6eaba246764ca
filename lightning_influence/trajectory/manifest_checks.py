"""What a manifest must look like: whatever else is in one, no fit has written, and nothing of it is used."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_MOST_PROCESSES = 2**16
_Check = Callable[[Any], bool]


def problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a manifest, as the end of a sentence that begins with "Expected"."""
    for name, (what, check) in _FIELDS.items():
        if name not in manifest or not check(manifest[name]):
            yield f"`{name}` to be {what}, got {manifest.get(name)!r:.80}"
            return
    for name, (what, check) in _OPTIONAL.items():
        if name in manifest and not check(manifest[name]):
            yield f"`{name}` to be {what}, got {manifest[name]!r:.80}"
            return
    averaged = [manifest["averaged"]] if manifest.get("averaged") else []
    for entry in (*manifest["checkpoints"], *averaged, *manifest["steps"]):
        if not inside(entry["file"]):
            yield f"files inside the run's folder, got {entry['file']!r:.80}"
    steps = [entry["step"] for entry in manifest["checkpoints"]]
    if any(one >= other for one, other in pairwise(steps)):
        yield f"`checkpoints` in the order of their steps, got {steps!r:.80}"


def inside(path: str) -> bool:
    """Whether a path stays in the folder that it is relative to, on any system."""
    kinds = PurePosixPath(path), PureWindowsPath(path)
    return bool(path) and "\0" not in path and not any(p.anchor or ".." in p.parts for p in kinds)


def _integer(least: int = 0, most: int = 2**63 - 1) -> _Check:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 2**63 and math.isfinite(x)


def _real(x: Any) -> bool:
    """A number that may be infinite or NaN, as limits and losses are."""
    return isinstance(x, float) or _number(x)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _optional(check: _Check) -> _Check:
    return lambda x: x is None or check(x)


def _list(check: _Check) -> _Check:
    return lambda x: isinstance(x, list) and all(map(check, x))


def _pair(first: _Check, second: _Check) -> _Check:
    return lambda x: isinstance(x, list) and len(x) == 2 and first(x[0]) and second(x[1])


def _entry(**fields: _Check) -> _Check:
    return lambda x: isinstance(x, dict) and all(check(x.get(name)) for name, check in fields.items())


def _only(names: Sequence[str], check: _Check) -> _Check:
    return lambda x: check(x) and not set(x) - set(names)


def _option(x: Any, depth: int = 3) -> bool:
    """An optimizer's option: a number, a flag, a name, or a few levels of lists of them."""
    if isinstance(x, list):
        return depth > 0 and all(_option(item, depth - 1) for item in x)
    return x is None or isinstance(x, (bool, str)) or _real(x)


def _group(x: Any) -> bool:
    numbers = ("momentum", "dampening", "weight_decay", "lr", "eps", "alpha", "lr_decay", "rho", "initial_lr")
    return (
        isinstance(x, dict)
        and _list(_text)(x.get("parameters"))
        and all(map(_option, x.values()))
        and all(_optional(_real)(x.get(name)) for name in numbers)
        and _optional(_list(_real))(x.get("betas"))
    )


_WRITTEN = {"file": _text, "size": _integer(), "crc32": _integer(0, 2**32 - 1)}
_STATE = _WRITTEN | {"step": _integer(), "epoch": _integer()}
_LINK = {
    "run": lambda x: _text(x) and re.fullmatch(r"run-\d+", x) is not None,
    "path": lambda x: _text(x) and "\0" not in x,
    "id": _text,
    "step": _integer(),
}
_BEST = {
    "path": lambda x: _text(x) and "\0" not in x,
    "monitor": _optional(_text),
    "step": _optional(_integer()),
    "global_step": _optional(_integer()),
    "averaged": lambda x: x is None or isinstance(x, bool),
}
_NEEDED = {
    "SGD": {"momentum", "dampening", "weight_decay", "nesterov", "maximize"},
    "Adam": {"betas", "eps", "weight_decay", "amsgrad", "maximize"},
    "AdamW": {"betas", "eps", "weight_decay", "amsgrad", "maximize"},
}


def _whole_options(x: Any) -> bool:
    """Whether torch's own optimizers have all their options, and no parameter is in two groups."""
    names = [name for group in x["groups"] for name in group["parameters"]]
    return len(names) == len(set(names)) and all(_NEEDED.get(x["kind"], set()) <= group.keys() for group in x["groups"])


_SETTINGS = _entry(
    optimizer=_integer(),
    kind=_text,
    groups=_list(_group),
    frozen=_optional(_list(_text)),
    clipping=_optional(_entry(algorithm=_text, limit=_optional(_real))),
)

# What a manifest must hold, in words and as a check.
_FIELDS: dict[str, tuple[str, _Check]] = {
    "format": ("a positive integer", _integer(1)),
    "id": ("a word", lambda x: _text(x) and bool(x)),
    "parent": ("the link to a run, or None", _optional(_entry(**_LINK))),
    "world_size": (f"from 1 to {_MOST_PROCESSES}", _integer(1, _MOST_PROCESSES)),
    "dataset_size": ("a number of examples, or None", _optional(_integer())),
    "settings": ("a list of optimizers' options", _list(lambda x: _SETTINGS(x) and _whole_options(x))),
    "checkpoints": (f"a list with {', '.join(_STATE)} and kind", _list(_entry(**_STATE, kind=_text))),
    "steps": (f"a list with {', '.join(_WRITTEN)}", _list(_entry(**_WRITTEN))),
    "notes": ("a list of texts", _list(_text)),
    "finished": ("true or false", lambda x: isinstance(x, bool)),
    "fit_seconds": ("a number of seconds", lambda x: _number(x) and x >= 0),
}
# What earlier versions did not write.
_OPTIONAL: dict[str, tuple[str, _Check]] = {
    "eval_modules": ("a list of names", _list(_text)),
    "trainer": ("a list of steps and values", _list(_pair(_integer(), lambda x: isinstance(x, dict)))),
    "removed": ("a list of steps", _list(_integer())),
    "averaged": (f"None or an entry with {', '.join(_STATE)}", _optional(_entry(**_STATE))),
    "best": (f"None or an entry with {', '.join(_BEST)}", _optional(_only(list(_BEST), _entry(**_BEST)))),
    "data": ("a text, or None", _optional(_text)),
    "broken": ("a text", _text),
    "callback": ("a text", _text),
}

_SUMMARY = _list(_real)
_FINGERPRINT = _list(
    _only(
        ("path", "dtype", "shape", "whole", "rows"),
        lambda x: (
            _entry(path=_text, dtype=_text, shape=_list(_integer()), whole=_SUMMARY, rows=_optional(_list(_SUMMARY)))(x)
            and len({len(row) for row in (x["whole"], *(x["rows"] or ()))} | {1 if x["dtype"] == "text" else 3}) == 1
            and len(x["whole"]) in (1, 3)
        ),
    )
)
_FIRST_BATCH = _only(
    ("ids", "positions", "loaded", "entered"),
    lambda x: (
        _entry(
            ids=_list(_integer(-(2**63))),
            positions=_list(_integer()),
            loaded=_optional(_FINGERPRINT),
            entered=_FINGERPRINT,
        )(x)
        and all(position < len(x["ids"]) for position in x["positions"])
        and all(
            leaf["rows"] is None or len(leaf["rows"]) == len(x["positions"])
            for leaf in (*(x["loaded"] or ()), *x["entered"])
        )
    ),
)
_VALUE = lambda x: isinstance(x, list) and len(x) == 3 and _integer()(x[0]) and _integer()(x[1]) and _real(x[2])  # noqa: E731
_FIRST_LOSSES = _only(
    ("ids", "entered", "values", "dtype", "drew"),
    _entry(
        ids=_list(_integer(-(2**63))),
        entered=_FINGERPRINT,
        values=_list(_VALUE),
        dtype=_text,
        drew=lambda x: isinstance(x, bool),
    ),
)
_FIT_DATA = {
    "dataset": _text,
    "collate": _text,
    "datamodule": _optional(_text),
    "hooks": lambda x: isinstance(x, dict) and all(map(_text, x.values())),
    "device": _text,
    "watched": lambda x: isinstance(x, bool),
    "confirmed": lambda x: isinstance(x, bool),
    "batches": _list(_FIRST_BATCH),
    "losses": _optional(_FIRST_LOSSES),
}


def is_fit_data(entry: Any) -> bool:
    """Whether this is what a fit writes of its training data."""
    return _only(list(_FIT_DATA), _entry(**_FIT_DATA))(entry)
