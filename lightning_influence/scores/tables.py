"""Scores as Arrow: the long table, and their file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence.files import arrow
from lightning_influence.numerics.topk import both_ends
from lightning_influence.report import Album
from lightning_influence.scores.base import Answer, file_head, read_file
from lightning_influence.scores.ranking import Ranking
from lightning_influence.scores.topk import TopK


def long_table(ranking: Ranking, k: int | None) -> pa.RecordBatchReader:
    """One row per query and training example, as a stream of one batch per query."""
    k = ranking.depth if k is None and ranking.top is not None else k
    ends = None if k is None else (ranking.strongest(k, True), ranking.strongest(k, False))
    kept = ranking.matrix if ranking.top is None else ranking.top[0].scores
    types = {
        "query_id": pa.int64(),
        "train_id": pa.int64(),
        "score": pa.from_numpy_dtype(kept.numpy().dtype),
        "rank": pa.int64(),
    }
    bases = {"query_base_id": ranking.query_base, "train_base_id": ranking.train_base}
    types |= {name: pa.int64() for name, base in bases.items() if base is not None}
    return arrow.stream(types, lambda row: _rows_of_query(ranking, row, ends), ranking.query_ids.numel())


def write(answer: Answer, ranking: Ranking, path: arrow.FilePath, overwrite: bool) -> Path:
    """Write a score matrix, or the strongest scores of each query, into one file with one row per query."""
    columns = {"query_id": ranking.query_ids, "query_base_id": ranking.query_base, "scores": ranking.matrix_if_kept}
    for name, end in zip(("proponent", "opponent"), ranking.top or (), strict=False):
        columns |= {f"{name}_scores": end.scores, f"{name}_ids": end.train_ids}
    head = file_head(answer) | {
        "allow_nan": ranking.allow_nan,
        "train_ids": arrow.pack_ids(ranking.train_ids),
        "train_base_ids": arrow.pack_ids(ranking.train_base),
    }
    kept = {name: column for name, column in columns.items() if column is not None}
    return arrow.write_file(path, "scores" if ranking.top is None else "top_k_scores", kept, head, overwrite)


def read(path: arrow.FilePath) -> tuple[dict[str, Any], dict[str, Any], Album | None]:
    """The arguments of `Scores` in a file of `write`, what its `Ranking` has besides, and the album.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of another kind.
    """
    found, head, album = read_file(path, ("scores", "top_k_scores"))
    columns, of_ranking = found.columns(), {"allow_nan": head.pop("allow_nan"), "check": found.check}
    base = (arrow.unpack_ids(head.pop("train_base_ids")), columns.get("query_base_id"))
    ids = {"train_ids": arrow.unpack_ids(head.pop("train_ids")), "query_ids": columns["query_id"]}
    return head | ids | {"values": columns.get("scores"), "top": _top_of(columns), "base": base}, of_ranking, album


def _top_of(columns: Mapping[str, Tensor]) -> tuple[TopK, TopK] | None:
    """The strongest proponents and opponents in a file's columns, or None where they hold all scores."""
    if "scores" in columns:
        return None
    best, worst = (TopK(columns[f"{name}_scores"], columns[f"{name}_ids"]) for name in ("proponent", "opponent"))
    return best, worst


def _rows_of_query(ranking: Ranking, row: int, ends: tuple[TopK, TopK] | None) -> dict[str, Tensor]:
    """All of a query's ranking, or its two ends without what is in both."""
    count = ranking.train_ids.numel()
    if ends is None:
        scores, ids = (part[0] for part in ranking.strongest(count, True, slice(row, row + 1)))
        rank = torch.arange(1, count + 1)
    else:
        if ranking.allow_nan and ranking.values is not None:
            count -= int(ranking.matrix[row].isnan().sum())
        scores, ids, rank = both_ends(count, *(part[row] for end in ends for part in end))
    made = {"query_id": ranking.query_ids[row].expand(ids.numel()), "train_id": ids, "score": scores, "rank": rank}
    if ranking.query_base is not None:
        made["query_base_id"] = ranking.query_base[row].expand(ids.numel())
    if ranking.train_base is not None:
        made["train_base_id"] = ranking.train_base[torch.searchsorted(ranking.train_ids, ids)]
    return made
