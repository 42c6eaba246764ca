"""Texts that files, figures and terminals do not take: in data, in labels, and in files of others."""

import matplotlib
import pytest
import torch

from lightning_influence import Scores
from lightning_influence.cli import main
from lightning_influence.plotting.example_view import printable
from lightning_influence.report import read_decisions

matplotlib.use("Agg")
ODD = [("bad \ud800 text \x1b[31m", "cl\udfff" * 10**6), ("x\x00y\x07", 1), ({"a\ud800": "b\x1b", "c": 1.0}, 2)]


def odd_scores():
    return Scores(
        torch.tensor([[1.0, -1.0, 0.5], [0.25, 2.0, -3.0]]),
        None,
        torch.arange(3),
        torch.arange(2),
        method="M\x1b[31m",
        units="u\x1b]0;title\x07",
        notes=["n\x1b[2J"],
        settings={"name": "s\x1b[5m"},
    )


def test_page_plot_and_file_take_any_text(tmp_path):
    scores = odd_scores()
    page = scores.report(tmp_path / "page.html", train=ODD, queries=ODD[:2])
    assert page.stat().st_size < 200_000
    assert "\x1b" not in page.read_text("utf-8")
    figure, _ = scores.plot(train=ODD, queries=ODD[:2], query=[0, 1])
    figure.savefig(tmp_path / "figure.png")
    again = Scores.load(scores.save(tmp_path / "scores.arrow", train=ODD, queries=ODD[:2], megabytes=0.1))
    assert (tmp_path / "scores.arrow").stat().st_size < 200_000
    again.report(tmp_path / "again.html")


def test_an_album_of_somebody_else_is_shown(tmp_path):
    scores = odd_scores()
    path = scores.save(tmp_path / "scores.arrow", train=ODD, queries=ODD[:2])
    again = Scores.load(path)
    again.album.train[0]["value"] = "lone \ud800 surrogate"
    assert "lone ? surrogate" in again.report(tmp_path / "page.html").read_text("utf-8")


def test_no_escape_reaches_the_terminal(tmp_path, capsys):
    path = odd_scores().save(tmp_path / "scores\x1b[31m.arrow")
    for command in (["show", str(path)], ["top", str(path), "-k", "3"], ["verify", str(path)], ["show", str(tmp_path)]):
        assert main(command) == 0
    assert main(["show", str(tmp_path / "none\x1b[31m")]) == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\x07" not in printed.out + printed.err
    assert "M�[31m" in printed.out


def test_printable_keeps_what_can_be_printed():
    text = "naïve 中文 🙂 a\nb\tc"
    assert printable(text) == text
    assert printable("a\x1bb\ud800c\x85d") == "a�b�c�d"
    assert printable("x" * 300, 200) == "x" * 199 + "…"


HEAD = "train_id,train_base_id,decision\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "3,3,w\xf6\n", "Expected a decision among"),
        (HEAD + "-3,3,fine\n", "Expected ids from 0 on in row 2"),
        (HEAD + "3,-3,fine\n", "Expected ids from 0 on in row 2"),
        (HEAD + "9" * 30 + ",3,fine\n", "Expected ids from 0 on in row 2"),
        (HEAD + "9" * 5000 + ",3,fine\n", "Expected two ids and a decision"),
        (HEAD + "3,3," + "x" * 200_000 + "\n", "field larger than field limit"),
        ("x" * 200_000 + "\n", "field larger than field limit"),
        (HEAD + "3,3," + "x" * 100_000 + "\n", "Expected a decision among"),
    ],
)
def test_decisions_that_nobody_downloaded_are_refused_in_few_words(tmp_path, text, says):
    path = tmp_path / "decisions.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says) as caught:
        read_decisions(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800


def test_decisions_saved_again_in_another_encoding_are_read(tmp_path):
    path = tmp_path / "decisions.csv"
    path.write_bytes((HEAD + "3,3,fine\n7,17,wrong label,\xe4rger\n").encode("latin-1"))
    assert read_decisions(path).base_ids.tolist() == [17]
