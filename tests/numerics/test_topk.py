"""The strongest few from tiles, against a sort of the whole matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.numerics.topk import StreamingTopK, both_ends, top_k


def _ranking(row, ids):
    """The definition: by score, descending, and among equal ones the smaller id first."""
    return sorted(zip(row.tolist(), ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))


def _fed(scores, ids, k, cuts):
    best = StreamingTopK(scores.shape[0], k, scores.dtype)
    for columns in torch.tensor_split(torch.arange(ids.numel()), sorted(cuts)):
        best.update(scores[:, columns], ids[columns])
    return best.result()


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    n_queries=st.integers(1, 4),
    n_train=st.integers(1, 40),
    k=st.integers(1, 12),
    levels=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 1000),
)
def test_any_tiling_gives_the_ends_of_the_whole_ranking(n_queries, n_train, k, levels, cuts, seed):
    draw = torch.Generator().manual_seed(seed)
    # Few levels make ties, also at the boundary and across tiles.
    scores = torch.randint(-levels, levels + 1, (n_queries, n_train), generator=draw).double()
    ids = torch.randperm(100, generator=draw)[:n_train]
    top, top_ids, bottom, bottom_ids = _fed(scores, ids, k, cuts)
    kept = min(k, n_train)
    for row in range(n_queries):
        expected = _ranking(scores[row], ids)
        assert list(zip(top[row].tolist(), top_ids[row].tolist(), strict=True)) == expected[:kept]
        assert list(zip(bottom[row].tolist(), bottom_ids[row].tolist(), strict=True)) == expected[::-1][:kept]


def test_queries_may_come_in_blocks():
    scores, ids = torch.randn(5, 30), torch.arange(30)
    best = StreamingTopK(5, 4)
    for rows in (slice(2, 5), slice(0, 2)):
        best.update(scores[rows, :10], ids[:10], first_query=rows.start)
        best.update(scores[rows, 10:], ids[10:], first_query=rows.start)
    torch.testing.assert_close(best.result()[0], scores.topk(4).values)
    torch.testing.assert_close(best.result()[1], scores.topk(4).indices)


def test_the_result_is_not_changed_by_what_comes_later():
    best = StreamingTopK(1, 1)
    best.update(torch.tensor([[1.0]]), torch.tensor([0]))
    early = best.result()
    best.update(torch.tensor([[2.0]]), torch.tensor([1]))
    assert early[0].item() == 1.0
    assert best.result()[1].item() == 1


def test_extreme_finite_scores_and_ids_beat_the_empty_places():
    limit = torch.finfo(torch.float64)
    best = StreamingTopK(1, 3, torch.float64)
    best.update(torch.tensor([[limit.min, limit.max]], dtype=torch.float64), torch.tensor([2**62, 0]))
    assert best.result()[1].tolist() == [[0, 2**62]]
    assert best.result()[3].tolist() == [[2**62, 0]]


def test_an_empty_tile_changes_nothing():
    best = StreamingTopK(1, 1)
    best.update(torch.ones(1, 1), torch.tensor([4]))
    best.update(torch.ones(1, 0), torch.ones(0, dtype=torch.int64))
    assert best.result()[1].item() == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [1, 3, 9])
def test_a_score_that_is_not_finite_is_refused_with_its_id(bad, width):
    tile = torch.randn(3, width)
    tile[2, width - 1] = bad
    with pytest.raises(ValueError, match=f"got .*(nan|inf) for query row 12 and training example {99 + width}"):
        StreamingTopK(13, 2).update(tile, torch.arange(100, 100 + width), first_query=10)


def test_shapes_that_do_not_fit_are_refused():
    best = StreamingTopK(2, 1)
    with pytest.raises(ValueError, match=r"rows among 2 queries, got shape \[3, 4\] from query 0"):
        best.update(torch.zeros(3, 4), torch.arange(4))
    with pytest.raises(ValueError, match=r"name 4 columns, got shape \[5\]"):
        best.update(torch.zeros(2, 4), torch.arange(5))


@pytest.mark.parametrize(
    ("n_queries", "k", "name", "value"),
    [(0, 1, "n_queries", 0), (1, 0, "k", 0), (True, 1, "n_queries", True), (1, 1.5, "k", 1.5)],
)
def test_sizes_that_are_no_positive_integers_are_refused(n_queries, k, name, value):
    with pytest.raises(ValueError, match=f"`{name}` to be a positive integer, got {value}"):
        StreamingTopK(n_queries, k)


def test_a_result_with_tiles_missing_is_refused():
    best = StreamingTopK(2, 1)
    with pytest.raises(ValueError, match="between 0 and 0 columns"):
        best.result()
    best.update(torch.zeros(1, 4), torch.arange(4))
    with pytest.raises(ValueError, match="between 0 and 4 columns"):
        best.result()


@settings(derandomize=True, max_examples=80, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 9), levels=st.integers(0, 5), seed=st.integers(0, 99))
def test_both_ends_are_a_part_of_the_whole_ranking_without_repeats(n, k, levels, seed):
    k = min(k, n)
    draw = torch.Generator().manual_seed(seed)
    row = torch.randint(-levels, levels + 1, (n,), generator=draw).double()
    ids = torch.arange(n) * 3
    top, bottom = top_k(row[None], ids, k), top_k(row[None], ids, k, largest=False)
    scores, names, rank = both_ends(n, top[0][0], top[1][0], bottom[0][0], bottom[1][0])
    expected = _ranking(row, ids)
    wanted = sorted({*range(k), *range(n - k, n)})
    assert rank.tolist() == [place + 1 for place in wanted]
    assert list(zip(scores.tolist(), names.tolist(), strict=True)) == [expected[place] for place in wanted]
