"""A reviewer's decisions, read from the file that the page downloaded."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.hints import hinted

DECISIONS = ("wrong label", "fine", "unsure")
_SAME = {"wrong target": "wrong label"}
_LINE = 200  # characters of a row that are shown
_ID, _BASE, _DECISION = "train_id", "train_base_id", "decision"


class Decisions(NamedTuple):
    """The training examples with one decision: matching `train_ids` and `base_ids` (under any `Subset`), int64.

    `base_ids` are None where the file has no column `train_base_id`.
    """

    train_ids: Tensor
    base_ids: Tensor | None


@hinted
def read_decisions(path: str | os.PathLike[str], decision: str = "wrong label") -> Decisions:
    r"""The training examples that were marked with a decision, by ascending id; by default those with a wrong label.

    Args:
        path: The CSV file that the page of `report` downloaded, or one of your own with the columns `train_id` and
            `decision`. A spreadsheet program may have saved it again.
        decision: "wrong label", "fine" or "unsure"; "wrong target", as the page of a regression calls the first, is the
            same.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another kind of file, or holds an unknown or contradictory decision.

    Example:
        >>> from pathlib import Path; from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "decisions.csv"
        >>> _ = path.write_text("train_id,train_base_id,decision\n7,107,wrong label\n3,103,fine\n")
        >>> read_decisions(path).train_ids.tolist(), read_decisions(path).base_ids.tolist()
        ([7], [107])
    """
    decision = _SAME.get(decision, decision)
    one_of("decision", decision, DECISIONS)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of decisions at {str(path)!r}, found none. Save one from the page.")
    # Spreadsheet programs write other encodings, which agree on what the page wrote.
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        head = file.readline(_LINE)
        file.seek(0)
        # In some countries, spreadsheet programs write semicolons.
        try:
            rows = [row for row in csv.reader(file, delimiter=";" if ";" in head else ",") if any(row)]
        except csv.Error as error:
            raise ValueError(
                f"Expected {str(path)!r} to be the table that the page downloaded, got another file ({error}). "
                "Download the decisions from the page again."
            ) from error
    names = [cell.strip() for cell in rows[0]] if rows else []
    if not {_ID, _DECISION} <= set(names) or len(set(names)) < len(names):
        raise ValueError(
            f"Expected {str(path)!r} to begin with the columns {_ID}, {_BASE} (which may be left out) and {_DECISION}, "
            f"got {_shown(rows[0] if rows else [])}. Download the decisions from the page again."
        )
    based = _BASE in names
    found: dict[int, tuple[int, str]] = {}
    for line, row in enumerate(rows[1:], start=2):
        try:
            cells = dict(zip(names, row[: len(names)], strict=True))
            train_id, word = int(cells[_ID]), cells[_DECISION].strip()
            base_id, word = int(cells[_BASE]) if based else train_id, _SAME.get(word, word)
        except ValueError:
            expected = f"{'two ids' if based else 'an id'} and a decision in row {line} of {str(path)!r}"
            raise ValueError(f"Expected {expected}, got {_shown(row)}.") from None
        if not (0 <= train_id < 2**63 and 0 <= base_id < 2**63):
            raise ValueError(f"Expected ids from 0 on in row {line} of {str(path)!r}, got {_shown(row)}.")
        if word not in DECISIONS:
            raise ValueError(
                f"Expected a decision among {', '.join(map(repr, DECISIONS))} in row {line} of {str(path)!r}, "
                f"got {_shown(word)}."
            )
        if found.setdefault(train_id, (base_id, word)) != (base_id, word):
            raise ValueError(f"Expected one decision per training example in {str(path)!r}, got two for {train_id}.")
    chosen = sorted((train_id, base_id) for train_id, (base_id, word) in found.items() if word == decision)
    ids = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    return Decisions(ids[:, 0].clone(), ids[:, 1].clone() if based else None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LINE else f"{text[:_LINE]}…"
