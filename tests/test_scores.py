"""What a reader can ask of the answer, and that it comes back from disk as it was."""

import builtins
import json
import os
import pickle
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from lightning_influence.files.arrow import FORMAT
from lightning_influence.scores import BaseIds, Scores, SelfScores, TopK, words

TRAIN_IDS = torch.tensor([0, 2, 3, 7, 9, 10])
QUERY_IDS = torch.tensor([4, 5, 8])
VALUES = torch.tensor(
    [[0.5, -1.0, 2.0, 0.0, 2.0, -3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]]
)


def full(**changes):
    given = {
        "values": VALUES,
        "top": None,
        "train_ids": TRAIN_IDS,
        "query_ids": QUERY_IDS,
        "method": "TracInCP",
        "settings": {"normalize": None, "units": "loss"},
        "units": "loss",
        "notes": ["the momentum 0.9 is in the learning rate."],
        "checkpoints": (10, 20, 30),
        "diagnostics": {"residual": 1.25e-4, "damping": 3},
    }
    return Scores(**{**given, **changes})


def kept(k=2, **changes):
    whole = full()
    return full(values=None, top=(whole.proponents(k), whole.opponents(k)), **changes)


def itself(**changes):
    given = {"train_ids": TRAIN_IDS, "values": VALUES[0], "method": "TracInCP", "settings": {"a": [1]}}
    return SelfScores(**{**given, **changes})


def without(monkeypatch, package):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)


# Reading


@pytest.mark.parametrize("scores", [full(), kept(3)], ids=["full", "top_k"])
def test_proponents_descend_and_the_smaller_id_comes_first_among_equals(scores):
    assert scores.proponents(3).train_ids[0].tolist() == [3, 9, 0]
    assert scores.proponents(3).scores[0].tolist() == [2.0, 2.0, 0.5]
    assert scores.opponents(2).train_ids.tolist() == [[10, 2], [0, 2], [10, 9]]
    assert scores.opponents(2).scores[0].tolist() == [-3.0, -1.0]


@pytest.mark.parametrize("scores", [full(), kept(3)], ids=["full", "top_k"])
def test_one_query_or_some_can_be_asked_for(scores):
    one = scores.proponents(2, query=5)
    assert (one.ids.tolist(), one.scores.tolist()) == (scores.proponents(2).train_ids[1].tolist(), [6.0, 5.0])
    assert one.ids is one.train_ids
    some = scores.opponents(1, query=[8, 4])
    assert some.train_ids.tolist() == [[10], [10]]
    assert some.query_ids.tolist() == [8, 4]
    with pytest.raises(ValueError, match=r"`query` to be among the 3 ids 4 to 8 that were scored, got \[6\]"):
        scores.proponents(1, query=6)


def test_the_strongest_print_as_a_table():
    scores = full(base=(TRAIN_IDS + 100, None))
    assert [line.split() for line in str(scores.proponents(2, query=4)).splitlines()] == [
        ["train_id", "train_base_id", "score"],
        ["3", "103", "2"],
        ["9", "109", "2"],
    ]
    lines = [line.split() for line in str(full().opponents(1)).splitlines()]
    assert lines[:2] == [["query_id", "train_id", "score"], ["4", "10", "-3"]]
    many = full(values=VALUES.repeat(20, 1), query_ids=torch.arange(60)).proponents(5)
    assert len(str(many).splitlines()) == 32
    assert str(many).endswith("and 54 more queries")
    again = pickle.loads(pickle.dumps(many))
    assert str(again) == str(many)
    assert str(TopK(many.scores[0], many.train_ids[0])).splitlines()[0].split() == ["train_id", "score"]
    values, ids = many
    assert (values is many.scores, ids is many.train_ids) == (True, True)


def test_diagnostics_settings_and_units_are_said_in_words():
    text = repr(full(units="arbitrary", diagnostics={"score_error": 0.0, "solver_residual": 2e-4, "of_mine": 3}))
    text = " ".join(text.split())
    assert "no unit (they rank; sums mean nothing)" in text
    assert "Largest relative residual of the solver 2.0e-04, of mine 3." in text
    assert "score" not in text.split("opponent.")[1].split("Note")[0].replace("scores", "")
    curvature = {"name": "EKFAC", "damping": None, "seed": 0}
    assert words.settings({"curvature": curvature, "removal": None}) == {"curvature": "EKFAC(seed=0)"}


def test_sizes_ids_and_settings_are_as_they_were_given():
    scores = full()
    assert len(scores) == 3
    assert scores.top_k is None
    assert kept(2).top_k == 2
    assert scores.settings == {"normalize": None, "units": "loss"}
    torch.testing.assert_close(scores.values, VALUES)
    assert scores.base_ids() == BaseIds(scores.train_ids, scores.query_ids)


def test_only_the_strongest_kept_has_no_matrix_and_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"only the 2 strongest .* score again with `top_k=None`"):
        _ = kept(2).values
    with pytest.raises(RuntimeError, match="full matrix was not kept"):
        kept(2).group([0])


@pytest.mark.parametrize(("scores", "k", "limit"), [(full(), 7, 6), (full(), 0, 6), (kept(2), 3, 2)])
def test_a_k_beyond_what_there_is_is_refused(scores, k, limit):
    with pytest.raises(ValueError, match=rf"`k` between 1 and {limit} \(.*\), got {k}"):
        scores.proponents(k)
    with pytest.raises(ValueError, match=rf"`k` between 1 and {limit}"):
        scores.to_arrow(k)


def test_a_group_is_the_sum_of_its_members(monkeypatch):
    monkeypatch.setattr("lightning_influence.scores.ranking.BLOCK", 2)
    torch.testing.assert_close(full().group([9, 0]), torch.tensor([2.5, 6.0, -6.0]))
    torch.testing.assert_close(full().group(TRAIN_IDS), VALUES.sum(dim=1))
    torch.testing.assert_close(full().group([]), torch.zeros(3))


def test_a_group_with_an_unknown_or_repeated_id_is_refused():
    with pytest.raises(ValueError, match=r"`ids` to be among the 6 ids 0 to 10 that were scored, got \[1, 99\]"):
        full().group([0, 99, 1])
    with pytest.raises(ValueError, match=r"distinct ids in `ids`, got \[3\] more than once"):
        full().group([3, 0, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_without_loss(dtype):
    assert torch.equal(full(values=VALUES.to(dtype)).values, VALUES)


def test_repr_says_method_size_units_sign_checkpoints_notes_and_the_strongest():
    text = " ".join(repr(full()).split())
    for part in (
        "TracInCP: scores of 3 queries by 6 training examples, units: loss.",
        "Positive is a proponent",
        "3 checkpoints (steps 10 to 30).",
        "Residual 0.000125.",
        "Note: the momentum 0.9 is in the learning rate.",
        "Query 4: strongest proponent 3 (+2), strongest opponent 10 (-3).",
        "Query 5: strongest proponent 10 (+6), no opponent.",
        "Query 8: no proponent, strongest opponent 10 (-6).",
    ):
        assert part in text
    assert "the 2 strongest proponents and opponents of each" in " ".join(repr(kept(2)).split())
    many = " ".join(repr(full(values=VALUES.repeat(2, 1), query_ids=torch.arange(6), checkpoints=(7,))).split())
    assert "And 3 more queries." in many
    assert "1 checkpoint (step 7)." in many


def test_printed_notes_have_a_line_each_without_what_is_routine():
    routine = "Gradients of all 57 parameters were computed the fast way"
    scores = full(notes=[routine, f"{routine}; not used by the loss: w", "long " * 30, "Short."])
    lines = repr(scores).splitlines()
    notes = [line for line in lines if line.startswith("Note: ")]
    assert [note[:10] for note in notes] == ["Note: Grad", "Note: long", "Note: Shor"]
    assert lines[-1] == "Note: Short."
    assert lines[-2].startswith("  long")
    assert max(map(len, lines)) <= 100
    assert scores.notes[0] == routine
    assert scores._repr_html_().count("<br>Note: ") == 3


# Base ids


def test_base_ids_are_shown_where_they_differ():
    scores = full(base=(TRAIN_IDS + 100, QUERY_IDS.clone()))
    assert scores.base_ids().train_ids.tolist() == [100, 102, 103, 107, 109, 110]
    assert "strongest proponent 3 (base 103) (+2)" in " ".join(repr(scores).split())
    table = scores.to_arrow(1)
    assert table.column_names == ["query_id", "train_id", "score", "rank", "train_base_id"]
    assert table["train_base_id"].to_pylist()[:2] == [103, 110]
    both = full(base=(TRAIN_IDS + 100, QUERY_IDS + 50)).to_arrow(1)
    assert both["query_base_id"].to_pylist()[:2] == [54, 54]


def test_base_ids_of_another_number_are_refused():
    with pytest.raises(
        ValueError, match=r"base ids for `train_ids` to be 6 int64 numbers, got torch.int64 of shape \[3\]"
    ):
        full(base=(QUERY_IDS, None))


# Construction


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_ids": TRAIN_IDS.flip(0)}, ValueError, "`train_ids` to be ascending and distinct, got 10 before 9"),
        (
            {"query_ids": torch.tensor([4, 4, 8])},
            ValueError,
            "`query_ids` to be ascending and distinct, got 4 before 4",
        ),
        ({"query_ids": QUERY_IDS.int()}, TypeError, "`query_ids` to be an int64 vector, got torch.int32"),
        ({"query_ids": QUERY_IDS[:0]}, ValueError, "`query_ids` to hold at least one id, got none"),
        ({"values": VALUES.T}, ValueError, r"\[query, train\] = \[3, 6\], got \[6, 3\]"),
        ({"values": VALUES.long()}, TypeError, "floating point, got torch.int64"),
        ({"values": None}, ValueError, "either `values` or `top`"),
        ({"settings": {"a": object()}}, TypeError, "`settings` to hold what JSON can"),
        (
            {"diagnostics": {"a": "much"}},
            TypeError,
            r"`diagnostics` to map names to single numbers, got \{'a': 'much'\}",
        ),
        ({"diagnostics": {"a": torch.ones(2)}}, TypeError, "`diagnostics` to map names to single numbers"),
        ({"diagnostics": [1.0]}, TypeError, r"`diagnostics` to map names to single numbers, got \[1.0\]"),
    ],
)
def test_bad_parts_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        full(**changes)


def test_ends_that_do_not_fit_are_refused():
    best, worst = full().proponents(2), full().opponents(2)
    with pytest.raises(ValueError, match=r"opponents in `top` .* = \[3, 2\] with k from 1 to 6, got \[3, 3\]"):
        full(values=None, top=(best, full().opponents(3)))
    with pytest.raises(ValueError, match="proponents in `top` to be sorted"):
        full(values=None, top=(worst, worst))
    with pytest.raises(ValueError, match=r"`top` to be among .* got \[1"):
        full(values=None, top=(TopK(best.scores, torch.ones_like(best.train_ids)), worst))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused_by_name(bad, monkeypatch):
    monkeypatch.setattr("lightning_influence.scores.ranking.BLOCK", 6)
    values = VALUES.clone()
    values[1, 3] = bad
    with pytest.raises(ValueError, match=rf"got {bad} for query 5 and training example 7 .*\[7\]"):
        full(values=values)
    with pytest.raises(ValueError, match=rf"got {bad} for training example 7"):
        itself(values=values[1])


def test_nan_that_is_meant_stands_in_no_ranking(tmp_path):
    values = VALUES.clone()
    values[0, [2, 5]] = torch.nan
    scores = Scores.load(full(values=values, allow_nan=True).save(tmp_path / "s.arrow"))
    assert scores.proponents(2).train_ids[0].tolist() == [9, 0]
    assert scores.opponents(2).train_ids[0].tolist() == [2, 7]
    assert scores.proponents(6).scores[0].isnan().sum() == 2
    assert scores.to_arrow(1).slice(0, 2).to_pydict()["rank"] == [1, 4]
    assert scores.to_arrow(6).num_rows == 4 + 6 + 6


# The long table


def test_the_long_table_ranks_every_score():
    table = full().to_arrow()
    assert table.column_names == ["query_id", "train_id", "score", "rank"]
    assert table.schema.field("score").type == pa.float32()
    first = table.slice(0, 6).to_pydict()
    assert first["query_id"] == [4] * 6
    assert first["train_id"] == [3, 9, 0, 7, 2, 10]
    assert first["score"] == [2.0, 2.0, 0.5, 0.0, -1.0, -3.0]
    assert first["rank"] == [1, 2, 3, 4, 5, 6]
    assert table.num_rows == 18


@pytest.mark.parametrize("scores", [full(), kept(2), kept(4)], ids=["full", "top_2", "top_4"])
def test_k_keeps_both_ends_with_the_ranks_of_the_whole(scores):
    whole = {tuple(row.values()) for row in full().to_arrow().to_pylist()}
    table = scores.to_arrow(2)
    assert table["rank"].to_pylist() == [1, 2, 5, 6] * 3
    assert {tuple(row.values()) for row in table.to_pylist()} <= whole
    if scores.top_k == 4:
        assert scores.to_arrow().equals(full().to_arrow())


def test_the_long_table_is_streamed_query_by_query():
    reader = full(values=VALUES.double()).to_batches()
    first = reader.read_next_batch()
    assert first.num_rows == 6
    assert first.schema.field("score").type == pa.float64()
    assert sum(batch.num_rows for batch in reader) == 12


def test_pandas_gets_the_same_table():
    frame = full().to_pandas(k=1)
    assert list(frame.columns) == ["query_id", "train_id", "score", "rank"]
    assert frame["train_id"].tolist() == [3, 10, 10, 0, 0, 10]


@pytest.mark.parametrize("scores", [full(), itself()])
def test_without_pandas_the_error_names_the_extra(scores, monkeypatch):
    without(monkeypatch, "pandas")
    with pytest.raises(ImportError, match=r'pip install "lightning-influence\[pandas\]"'):
        scores.to_pandas()


# On disk


def same(one, other):
    assert type(one) is type(other)
    assert repr(one) == repr(other)
    assert (one.settings, one.notes, one.checkpoints) == (other.settings, other.notes, other.checkpoints)
    assert one.diagnostics == other.diagnostics
    assert one.to_arrow().equals(other.to_arrow())


@pytest.mark.parametrize(
    "scores",
    [
        full(),
        full(values=VALUES.double()),
        full(train_ids=torch.arange(6), base=(torch.arange(6).flip(0), QUERY_IDS + 1)),
        kept(2),
        kept(6, base=(TRAIN_IDS * 2, None)),
        itself(),
        itself(values=VALUES[0].double(), base=TRAIN_IDS + 1, checkpoints=[3], diagnostics={"residual": float("inf")}),
    ],
)
def test_what_was_saved_comes_back(scores, tmp_path):
    path = scores.save(tmp_path / "new" / "scores.arrow")
    back = type(scores).load(path)
    same(back, scores)
    assert os.listdir(path.parent) == ["scores.arrow"]
    assert pa.ipc.open_file(path).read_all().num_rows == len(scores)


def test_a_file_from_before_there_were_diagnostics_is_read(tmp_path):
    path = without_checksums(full(diagnostics={}).save(tmp_path / "s"))
    path.write_bytes(path.read_bytes().replace(b', "figures": {}', b" " * 15))
    assert b"figures" not in path.read_bytes()
    assert Scores.load(path).diagnostics == {}


def without_checksums(path):
    """The file as the first format was: the same columns, and no table of checksums."""
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    head = table.schema.metadata[b"lightning_influence"].replace(b'"format": 2', b'"format": 1')
    with pa.ipc.new_file(path, table.schema.with_metadata({b"lightning_influence": head})) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("scores", [full(), itself(diagnostics={"residual": 0.5})])
def test_diagnostics_are_called_figures_in_a_file_and_by_an_alias(scores, tmp_path):
    path = scores.save(tmp_path / "s")
    assert b'"figures": {"residual"' in path.read_bytes()
    assert b"diagnostics" not in path.read_bytes()
    assert type(scores).load(path).figures == scores.figures == scores.diagnostics
    with pytest.raises(AttributeError):
        scores.figures = {}


def test_writing_into_a_loaded_matrix_does_not_change_the_file(tmp_path):
    path = full().save(tmp_path / "s")
    scores = Scores.load(path)
    before = path.read_bytes()
    scores.values.zero_()
    assert path.read_bytes() == before
    torch.testing.assert_close(Scores.load(path).values, VALUES)


LOADS = """
import resource, sys
from lightning_influence.scores import Scores
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = Scores.load(sys.argv[1])
assert float(scores.values[200, 7]) == 3.0
assert repr(scores).startswith("TracInCP")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is read by the resource module")
def test_loading_reads_only_what_is_looked_at(tmp_path):
    values = torch.zeros(400, 50_000)
    values[200, 7] = 3.0
    path = Scores(values, None, torch.arange(50_000), torch.arange(400), method="TracInCP").save(tmp_path / "s")
    run = subprocess.run([sys.executable, "-c", LOADS, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 30_000, "kilobytes, of a file of 80,000"


def test_a_file_in_parts_is_joined(tmp_path):
    whole = pa.ipc.open_file(without_checksums(full().save(tmp_path / "s"))).read_all()
    with pa.ipc.new_file(tmp_path / "parts", whole.schema) as writer:
        for row in range(3):
            writer.write_table(whole.slice(row, 1))
    same(Scores.load(tmp_path / "parts"), full())


def test_a_file_that_is_there_is_kept_unless_it_may_go(tmp_path):
    path = full().save(tmp_path / "s")
    with pytest.raises(FileExistsError, match=r"found one. Pass `overwrite=True`"):
        kept(2).save(path)
    assert Scores.load(path).top_k is None
    mapped = Scores.load(path)
    assert Scores.load(kept(2).save(path, overwrite=True)).top_k == 2
    torch.testing.assert_close(mapped.values, VALUES)
    with pytest.raises(IsADirectoryError, match="Add a file name"):
        full().save(tmp_path, overwrite=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = full().save(tmp_path / "s")

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        kept(2).save(path, overwrite=True)
    assert os.listdir(tmp_path) == ["s"]
    same(Scores.load(path), full())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path, share):
    path = full().save(tmp_path / "s")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged, cut short or of another origin"):
        Scores.load(path)


def test_foreign_later_and_missing_files_are_refused(tmp_path):
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(tmp_path / "foreign", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="of another origin"):
        Scores.load(tmp_path / "foreign")
    (tmp_path / "text").write_text("query,train\n")
    with pytest.raises(ValueError, match="of another origin"):
        SelfScores.load(tmp_path / "text")
    head = {b"lightning_influence": json.dumps({"format": FORMAT + 1, "kind": "scores"}).encode()}
    with pa.ipc.new_file(tmp_path / "later", table.schema.with_metadata(head)) as writer:
        writer.write_table(table.replace_schema_metadata(head))
    with pytest.raises(ValueError, match=f"of format {FORMAT} or earlier, got {FORMAT + 1}. Update"):
        Scores.load(tmp_path / "later")
    with pytest.raises(FileNotFoundError, match="found none"):
        Scores.load(tmp_path / "missing")


def test_a_folder_is_refused_with_the_files_of_scores_in_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got the folder '.*', without any\. `save`"):
        Scores.load(tmp_path)
    (tmp_path / "run-0" / "scores").mkdir(parents=True)
    path = full().save(tmp_path / "run-0" / "scores" / "TracInCP.arrow")
    for folder in (tmp_path, tmp_path / "run-0", tmp_path / "run-0" / "scores"):
        for kind in (Scores, SelfScores):
            with pytest.raises(FileNotFoundError, match="in which there are") as error:
                kind.load(folder)
            assert repr(str(path)) in str(error.value)


def test_the_other_kind_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"to hold scores, got self_scores. Use `SelfScores.load`"):
        Scores.load(itself().save(tmp_path / "self"))
    with pytest.raises(ValueError, match=r"to hold self_scores, got top_k_scores. Use `Scores.load`"):
        SelfScores.load(kept(2).save(tmp_path / "top"))


# Self-influence


def test_the_highest_self_influence_comes_first():
    assert itself().top(3).train_ids.tolist() == [3, 9, 0]
    assert itself().top(3).scores.tolist() == [2.0, 2.0, 0.5]
    assert len(itself()) == 6
    with pytest.raises(ValueError, match=r"`k` between 1 and 6 .* got 7"):
        itself().top(7)


def test_self_influence_as_a_table():
    table = itself(base=TRAIN_IDS + 1).to_arrow(2)
    assert table.to_pydict() == {"train_id": [3, 9], "score": [2.0, 2.0], "rank": [1, 2], "train_base_id": [4, 10]}
    assert itself().to_pandas()["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert itself().base_ids().tolist() == TRAIN_IDS.tolist()
    assert "highest: 3 (base 4): 2" in " ".join(repr(itself(base=TRAIN_IDS + 1)).split())


def test_self_influence_of_another_number_is_refused():
    with pytest.raises(ValueError, match=r"`values` to be 6 scores, one per training example, got shape \[5\]"):
        itself(values=VALUES[0, :5])
