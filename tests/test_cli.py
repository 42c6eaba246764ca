"""`lightning-influence`: what it prints of a real fit, its exit codes, and its errors."""

import shlex
import shutil
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import Influence, Scores, SelfScores, TracInCP
from lightning_influence.cli import COMMANDS, main


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with two runs; the newer one holds scores."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "influence"
    data = TensorDataset(torch.randn(20, 3), torch.randint(0, 2, (20,)))
    train = Subset(data, range(19, 3, -1))
    for methods in ((), (TracInCP(),)):
        influence = Influence(methods, queries=Subset(data, range(4)), self_influence=bool(methods), dirpath=folder)
        trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[influence])
        trainer.fit(Net(), DataLoader(train, batch_size=8, shuffle=True))
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "influence")


def said(capsys, *arguments):
    """Exit code, output, errors."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(text, first):
    """The line that begins with a word, as words."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_show_lists_runs_checkpoints_and_scores(written, capsys):
    code, out, _ = said(capsys, "show", written)
    assert code == 0
    assert "influence: 2 runs" in out
    # run, finished, steps, checkpoints, examples, seconds, scores
    assert [cells(out, "run-0")[i] for i in (1, 2, 3, 4, 6)] == ["yes", "4", "3", "16", "0"]
    assert [cells(out, "run-1")[i] for i in (1, 2, 3, 4, 6)] == ["yes", "4", "3", "16", "2"]
    assert "a fit of 4 steps on 16 training examples, finished" in out
    assert "batch order known; 3 checkpoints" in out
    assert [cells(out, "4")[i] for i in (0, 1, 2, 5)] == ["4", "1", "0.1", "step-00000004.pt"]
    assert cells(out, "TracInCP.arrow")[1:5] == ["TracInCP", "4", "16", "all"]
    assert cells(out, "TracInCP.self.arrow")[1:5] == ["TracInCP", "-", "16", "self-influence"]


def test_partial_scores_are_not_taken_for_complete_ones(copy, capsys):
    folder = copy / "run-1" / "scores"
    shutil.copy(folder / "TracInCP.arrow", folder / "SOURCE.partial.arrow")
    out = said(capsys, "show", copy)[1]
    assert cells(out, "run-1")[6] == "2"
    assert cells(out, "SOURCE.partial.arrow")[4:6] == ["all,", "partial"]
    (folder / "TracInCP.self.arrow").unlink()
    assert said(capsys, "top", folder, "--query", 0)[0] == 0


def test_show_of_one_run_of_a_folder_of_scores_and_of_a_file(written, capsys):
    assert "run-0: a fit of 4 steps" in said(capsys, "show", written / "run-0")[1]
    assert "2 files of scores" in said(capsys, "show", written / "run-1" / "scores")[1]
    path = written / "run-1" / "scores" / "TracInCP.arrow"
    out = said(capsys, "show", path)[1]
    assert repr(Scores.load(path)) in out
    assert "units: loss" in " ".join(out.split())
    assert "normalize" not in out  # None says nothing
    assert "units  " not in out  # what was asked for, which need not be what the scores have


def test_top_prints_both_ends_of_a_query_with_base_ids(written, capsys):
    path = written / "run-1" / "scores" / "TracInCP.arrow"
    code, out, _ = said(capsys, "top", path, "--query", 2, "-k", 3)
    row = Scores.load(path).values[2].tolist()
    ranked = sorted(range(16), key=lambda i: -row[i])
    best = [[str(i), str(19 - i), f"{row[i]:.4g}"] for i in ranked[:3] if row[i] > 0]
    worst = [[str(i), str(19 - i), f"{row[i]:.4g}"] for i in ranked[:-4:-1] if row[i] < 0]
    assert code == 0
    _, above, below = out.split("\nproponents\n")[0], *out.split("\nproponents\n")[1].split("\nopponents\n")
    assert [line.split() for line in above.splitlines()] == [["train_id", "train_base_id", "score"], *best]
    assert [line.split() for line in below.splitlines()] == [["train_id", "train_base_id", "score"], *worst]
    assert said(capsys, "top", path)[1].startswith("TracInCP: influence on query 0, units: loss")


def test_top_says_none_where_no_score_has_that_sign(tmp_path, capsys):
    path = Scores(torch.tensor([[1.0, 2.0]]), None, torch.arange(2), torch.tensor([5]), method="M").save(tmp_path / "s")
    out = said(capsys, "top", path, "-k", 2)[1]
    assert out.endswith("opponents\n  none\n")
    assert [line.split() for line in out.splitlines()[2:6]] == [
        ["proponents"],
        ["train_id", "score"],
        ["1", "2"],
        ["0", "1"],
    ]


def test_top_of_self_influence(written, capsys):
    path = written / "run-1" / "scores" / "TracInCP.self.arrow"
    out = said(capsys, "top", path, "-k", 2)[1]
    best = SelfScores.load(path).top(2)
    assert "highest self-influence, 16 training examples" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [str(i) for i in best.train_ids.tolist()]


def test_report_writes_the_page_with_the_self_influence_beside_it(written, capsys, tmp_path):
    pytest.importorskip("jinja2")
    scores = written / "run-1" / "scores"
    code, out, _ = said(capsys, "report", scores / "TracInCP.arrow", "-o", tmp_path / "both.html")
    assert (code, out.splitlines()[1:]) == (0, [str(tmp_path / "both.html")])
    assert "`Influence(album=True)`" in out.splitlines()[0]
    said(capsys, "report", written, "-o", tmp_path / "folder.html")
    assert (tmp_path / "folder.html").read_text() == (tmp_path / "both.html").read_text()
    said(capsys, "report", scores / "TracInCP.self.arrow", "-o", tmp_path / "self.html")
    alone = shutil.copy(scores / "TracInCP.arrow", tmp_path / "alone.arrow")
    said(capsys, "report", alone, "-o", tmp_path / "alone.html")
    Scores.load(alone).report(tmp_path / "expected.html")
    assert (tmp_path / "alone.html").read_text() == (tmp_path / "expected.html").read_text()
    itself = SelfScores.load(scores / "TracInCP.self.arrow")
    itself.report(tmp_path / "expected.html")
    assert (tmp_path / "self.html").read_text() == (tmp_path / "expected.html").read_text()
    Scores.load(alone).report(tmp_path / "expected.html", self_scores=itself)
    assert (tmp_path / "both.html").read_text() == (tmp_path / "expected.html").read_text()
    assert len({(tmp_path / f"{name}.html").read_text() for name in ("both", "self", "alone")}) == 3


def test_verify_says_what_is_whole_and_what_can_be_computed(written, capsys):
    code, out, _ = said(capsys, "verify", written)
    assert code == 0
    assert out.endswith("All files are intact.\n")
    files = [p for p in (written / "run-1").rglob("*") if p.is_file()]
    assert f"{len(files)} of {len(files)} files are intact" in out
    assert cells(out, "TracInCP") == ["TracInCP", "yes"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda run: (run / "checkpoints" / "step-00000002.pt").unlink(), "got 'No such file or directory'"),
        (lambda run: _flip(run / "checkpoints" / "step-00000002.pt"), "Expected checksum"),
        (lambda run: _flip(next(run.glob("steps/*.arrow"))), "Expected checksum"),
        (lambda run: _flip(run / "manifest.json"), "Expected a whole manifest"),
        (lambda run: _cut(run / "scores" / "TracInCP.arrow"), "damaged, cut short"),
    ],
    ids=["checkpoint gone", "checkpoint changed", "steps changed", "manifest changed", "scores cut"],
)
def test_verify_names_what_is_damaged_and_the_other_run_is_still_checked(copy, capsys, spoil, text):
    spoil(copy / "run-1")
    code, out, _ = said(capsys, "verify", copy)
    assert code == 1
    assert text in out
    assert out.count("DAMAGED: ") == 1
    assert out.endswith("1 problem found.\n")
    assert "methods that can be computed" in out.split("run-1")[0]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_a_damaged_run_is_a_line_of_the_table(copy, capsys):
    _flip(copy / "run-0" / "manifest.json")
    code, out, _ = said(capsys, "show", copy)
    assert code == 0
    assert cells(out, "run-0")[1:3] == ["unreadable:", "see"]
    _cut(copy / "run-1" / "scores" / "TracInCP.arrow")
    assert cells(said(capsys, "show", copy)[1], "TracInCP.arrow")[1] == "unreadable:"


@pytest.mark.parametrize("command", ["show", "top", "report", "verify"])
def test_what_is_not_there_is_an_error_one_can_act_on(command, capsys, tmp_path):
    code, out, err = said(capsys, command, tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"lightning-influence {command}: Expected a folder that `Influence` wrote or a file of scores"
    )
    code, _, err = said(capsys, command, tmp_path)
    assert code == 1
    assert str(tmp_path) in err


@pytest.mark.parametrize("command", ["show", "verify", "report", "top"])
def test_a_folder_above_the_runs_stands_for_the_only_ones_below_it(command, copy, capsys, monkeypatch, tmp_path):
    logged = tmp_path / "lightning_logs" / "version_0"
    (logged / "checkpoints").mkdir(parents=True)
    inside = copy.rename(logged / "influence")
    (inside / "run-1" / "scores" / "TracInCP.self.arrow").unlink()
    monkeypatch.chdir(tmp_path)
    for above in (".", "lightning_logs", logged):
        assert said(capsys, command, above)[0] == 0
    second = tmp_path / "lightning_logs" / "version_1" / "influence"
    shutil.copytree(inside, second)
    code, _, err = said(capsys, command, tmp_path)
    assert code == 1
    assert err.endswith(f"Pass one:\n  {inside}\n  {second}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--query", "77"], "Expected `--query` to be among the 4 ids 0 to 3 that were scored, got [77]"),
        (["-k", "0"], "Expected `k` between 1 and 16 (the number of training examples), got 0"),
    ],
)
def test_top_refuses_what_was_not_scored(written, capsys, arguments, text):
    code, _, err = said(capsys, "top", written / "run-1" / "scores" / "TracInCP.arrow", *arguments)
    assert code == 1
    assert text in err


def test_top_of_self_influence_has_no_query_and_a_folder_of_two_is_ambiguous(written, capsys):
    scores = written / "run-1" / "scores"
    assert "Leave `--query` out" in said(capsys, "top", scores / "TracInCP.self.arrow", "--query", 1)[2]
    for folder in (scores, scores.parent, written):
        assert f"Pass one of these:\n  {scores / 'TracInCP.arrow'}\n" in said(capsys, "top", folder)[2]
    assert said(capsys, "top", scores / "TracInCP.self.arrow", "-k", "-1")[0] == 1


@pytest.mark.parametrize("arguments", [[], ["top"], ["dance"], ["top", "x", "-k", "many"]])
def test_wrong_arguments_end_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: lightning-influence" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " ".join(COMMANDS[command].split())[:40] in out
    assert "exit codes: 0" in out


@pytest.mark.slow
def test_the_module_is_a_program_and_a_closed_pipe_is_no_error(written):
    path = written / "run-1" / "scores" / "TracInCP.arrow"
    command = [sys.executable, "-m", "lightning_influence", "top", str(path)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ran.stdout.startswith("TracInCP: influence on query 0")
    piped = shlex.join(command) + " | true"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", piped], check=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("", "")
