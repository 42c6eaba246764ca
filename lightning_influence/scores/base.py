"""What every answer carries beside its numbers: where they come from, whose they are, and the checks they passed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_influence import report
from lightning_influence.plotting.example_view import normalization_of

BLOCK = 1 << 24  # scores looked at together: 64 MB of float32
_SIGN = "Positive is a proponent (having the example in the training set makes the query better), negative an opponent."


class TopK(NamedTuple):
    """The strongest training examples: scores and ids, [query, k] (of `SelfScores`: [k])."""

    scores: Tensor
    train_ids: Tensor


class BaseIds(NamedTuple):
    """Indices into the datasets that lie under `Subset` and `random_split`: [train] and [query] int64."""

    train_ids: Tensor
    query_ids: Tensor


class Answer:
    """What `Scores` and `SelfScores` share.

    Args:
        train_ids: [train] int64, ascending.
        method: Name of the method.
        settings: Its hyper-parameters, JSON-able.
        units: What one unit of a score is, in words.
        notes: What a reader must know to trust the numbers.
        checkpoints: Steps of the checkpoints that were used.
        train_base: [train] int64, the ids in the dataset under a `Subset`; None where they are the same.
        figures: Numbers that tell how far to trust the scores, by name, such as a solver's residual.

    Raises:
        TypeError: `settings` that JSON cannot hold, ids that are not int64, or `figures` that are no numbers.
        ValueError: Ids that are not ascending, or base ids of another number.
    """

    def __init__(
        self,
        train_ids: Tensor,
        method: str,
        settings: Mapping[str, Any] | None,
        units: str,
        notes: Sequence[str],
        checkpoints: Sequence[int],
        train_base: Tensor | None,
        figures: Mapping[str, float] | None,
    ) -> None:
        try:
            self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        except TypeError as error:
            raise TypeError(
                f"Expected `settings` to hold what JSON can (numbers, strings, lists, dicts), got {settings!r}."
            ) from error
        self.method = method
        self.units = units
        self.notes = tuple(notes)
        self.checkpoints = tuple(int(step) for step in checkpoints)
        self.train_ids = ascending("train_ids", train_ids)
        self._train_base = base_of("train_ids", train_base, self.train_ids)
        self.figures = numbers("figures", figures)

        self.at_hand: tuple[Any, Any] = (None, None)
        """The training dataset and the queries', for pictures; only while the process that scored them lives."""

        self.album: report.Album | None = None
        """What the examples look like, where `save` was told to keep it."""

    def __getstate__(self) -> dict[str, Any]:
        # Datasets may be large, or bound to open files: neither travels with the scores.
        return self.__dict__ | {"at_hand": (None, None)}

    def _collect(self, data: tuple[Any, Any], orders: tuple[Any, Any], megabytes: float, **how: Any) -> report.Album:
        """What the examples look like: those of `data` or at hand, in two orders of importance."""
        train, queries = (hand if given is None else given for given, hand in zip(data, self.at_hand, strict=True))
        if how.get("normalization") is None:
            how["normalization"] = normalization_of(queries if train is None else train)
        return report.collect(train, queries, *orders, report.Showing(**how), megabytes)

    def _kept_album(self, shown: dict[str, Any], make: Callable[..., report.Album]) -> dict[str, str]:
        """The album for a file: a new one where `shown` asks for it, otherwise the one that is there."""
        if not shown:
            return {} if self.album is None else {"album": self.album.to_json()}
        data = [shown.get(name) for name in ("train", "queries")]
        if all(one is None for one in (*data, *self.at_hand)):
            raise ValueError(
                f"Expected data to show with `{'`, `'.join(shown)}`, got none: they are at hand only where the scores "
                "were computed. Pass `train=` and `queries=` too."
            )
        self.album = make(**shown)
        return {"album": self.album.to_json()}

    def _facts(self) -> list[str]:
        """What a reader must know, for the page."""
        sentences = [f"Method: {self.method}. Units of the scores: {self.units}.", _SIGN]
        if self.settings:
            sentences.append(
                "Settings: " + ", ".join(f"{name} = {value}" for name, value in self.settings.items()) + "."
            )
        if self.checkpoints:
            sentences.append(self._steps())
        if self.figures:
            sentences.append(", ".join(f"{name} {value:.3g}" for name, value in self.figures.items()) + ".")
        return [*sentences, *(f"{note.rstrip('.')}." for note in self.notes)]

    def _steps(self) -> str:
        first, last, count = min(self.checkpoints), max(self.checkpoints), len(self.checkpoints)
        steps = f"step {first}" if count == 1 else f"steps {first} to {last}"
        return f"{count} checkpoint{'s' * (count > 1)} ({steps})."

    def _head(self) -> dict[str, Any]:
        names = ("method", "settings", "units", "notes", "checkpoints", "figures")
        return {name: getattr(self, name) for name in names}

    def _paragraph(self, size: str, findings: Sequence[str]) -> str:
        sentences = [f"{self.method}: {size}, units: {self.units}.", _SIGN]
        if self.checkpoints:
            sentences.append(self._steps())
        if self.figures:
            sentences.append(", ".join(f"{name} {value:.3g}" for name, value in self.figures.items()) + ".")
        sentences += [f"Note: {note.rstrip('.')}." for note in self.notes]
        return textwrap.fill(" ".join([*sentences, *findings]), width=100)

    def _train_name(self, train_id: int) -> str:
        """The id, and the base id where it is another."""
        return name_of(train_id, self.train_ids, self._train_base)


def ascending(name: str, ids: Tensor) -> Tensor:
    """The ids on the CPU, or what is wrong with them."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise TypeError(f"Expected `{name}` to be an int64 vector, got {ids.dtype} of shape {list(ids.shape)}.")
    ids = ids.detach().cpu()
    if not ids.numel():
        raise ValueError(f"Expected `{name}` to hold at least one id, got none. Is the dataset empty?")
    falls = (ids.diff() <= 0).nonzero().flatten()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(
            f"Expected `{name}` to be ascending and distinct, got {int(ids[at])} before {int(ids[at + 1])}. "
            "Sort the ids, and the scores with them."
        )
    return ids


def base_of(name: str, base: Tensor | None, ids: Tensor) -> Tensor | None:
    """The base ids, or None where they say nothing new."""
    if base is None:
        return None
    if base.dtype != torch.int64 or base.shape != ids.shape:
        raise ValueError(
            f"Expected base ids for `{name}` to be {ids.numel()} int64 numbers, "
            f"got {base.dtype} of shape {list(base.shape)}."
        )
    base = base.detach().cpu()
    return None if torch.equal(base, ids) else base


def numbers(name: str, figures: Mapping[str, float] | None) -> dict[str, float]:
    """Figures by name as plain floats, or what is wrong with them."""
    try:
        return {str(key): float(value) for key, value in (figures or {}).items()}
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TypeError(f"Expected `{name}` to map names to single numbers, got {figures!r}.") from error


def floating(values: Tensor) -> Tensor:
    """The scores on the CPU as contiguous float32 or float64."""
    if not values.dtype.is_floating_point:
        raise TypeError(f"Expected scores to be floating point, got {values.dtype}.")
    values = values.detach().cpu().contiguous()
    # Half precision has no Arrow reader everywhere; float32 holds all of its numbers.
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def whole_numbers(ids: Any) -> Tensor:
    """Ids as int64: neither cut off fractions nor a mask, whose True would be the id 1.

    Raises:
        TypeError: They are not whole numbers.
    """
    found = torch.as_tensor(ids).flatten()
    if found.numel() and (found.dtype is torch.bool or found.is_floating_point() or found.is_complex()):
        raise TypeError(f"Expected `ids` to be whole numbers, got {found.dtype}. Of a mask, pass `mask.nonzero()`.")
    return found.to(torch.int64)


def places(known: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Where the wanted ids stand among the known ones, which ascend."""
    at = torch.searchsorted(known, wanted).clamp(max=known.numel() - 1)
    missing = wanted[known[at] != wanted]
    if missing.numel():
        raise ValueError(
            f"Expected `{name}` to be among the {known.numel()} ids {int(known[0])} to {int(known[-1])} that were "
            f"scored, got {missing[:5].tolist()!r}."
        )
    return at


def name_of(one: int, ids: Tensor, base: Tensor | None) -> str:
    """The id as text, and the base id where there is another."""
    if base is None:
        return str(one)
    return f"{one} (base {int(base[int(torch.searchsorted(ids, one))])})"


def side(score: float) -> str:
    """The word for a score's sign."""
    return "proponent" if score > 0 else "opponent" if score < 0 else "neither"


def refuse_non_finite(values: Tensor, train_ids: Tensor, query_ids: Tensor | None) -> None:
    """Raise where a score is NaN or infinite, naming the examples. `values` are [query, train]."""
    width = max(1, values.shape[1])
    for start in range(0, values.shape[0], max(1, BLOCK // width)):
        block = values[start : start + max(1, BLOCK // width)]
        bad = (~block.isfinite()).nonzero()
        if not bad.numel():
            continue
        row, column = (int(place) for place in bad[0])
        query = "" if query_ids is None else f"query {int(query_ids[start + row])} and "
        names = train_ids[bad[:, 1].unique()[:5]].tolist()
        raise ValueError(
            f"Expected finite scores, got {block[row, column].item()!r} for {query}training example "
            f"{int(train_ids[column])} (training examples concerned: {names!r}"
            f"{' and more' if bad[:, 1].unique().numel() > 5 else ''}). Look at their losses and gradients, or pass "
            "`allow_nan=True` where such scores are meant."
        )


def checked_top(top: tuple[TopK, TopK], n_queries: int, train_ids: Tensor) -> tuple[TopK, TopK]:
    """Both ends of the rankings, or what is wrong with them."""
    k = top[0].scores.shape[-1]
    ends = []
    for name, sign, (scores, ids) in zip(("proponents", "opponents"), (-1, 1), top, strict=True):
        if scores.shape != (n_queries, k) or ids.shape != scores.shape or not 1 <= k <= train_ids.numel():
            raise ValueError(
                f"Expected the {name} in `top` to be scores and ids of shape [query, k] = {[n_queries, k]} with k from "
                f"1 to {train_ids.numel()}, got {list(scores.shape)} and {list(ids.shape)}."
            )
        places(train_ids, ids.flatten().cpu(), "top")
        end = TopK(floating(scores), ids.detach().cpu())
        if not bool((end.scores.diff(dim=1) * sign >= 0).all()):
            raise ValueError(f"Expected the {name} in `top` to be sorted, strongest first, got another order.")
        ends.append(end)
    return ends[0], ends[1]
