"""Scores by several real processes equal those of one, and what one process refuses all refuse."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from fits import Indexed, Net, fit, loader, seeded
from gloo_score import FEW, Digits, N, data, dtype_of, methods
from oracles import assert_scores

from lightning_influence import Attributor, GradientDot, Influence, Scores, TracInCP, Trajectory
from lightning_influence.attribution.accumulators import Share
from lightning_influence.processes import Processes, processes_of

PROGRAM = Path(__file__).parent / "gloo_score.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Relative to the largest score of the query. In float32 eigenvectors of close eigenvalues turn with the order of sums.
TOLERANCE = {"full": 1e-10, "top": 1e-10, "single": 1e-5}


def run(folder, *arguments, launcher=(), check=True):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launcher, str(PROGRAM), str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def saved(folder, count):
    return [torch.load(folder / f"scores-{rank}.pt") for rank in range(count)]


def attributor_of(folder, word):
    dtype = dtype_of(word)
    shutil.rmtree(folder / "influence" / "run-0" / "curvature", ignore_errors=True)  # it is computed once more
    return Attributor(seeded(Digits, dtype), data(N, 1, dtype), Trajectory.load(folder / "influence"))


def assert_as_one(folder, word, count):
    """Every process has what one process computes of the same run."""
    attributor, queries, tolerance = attributor_of(folder, word), data(5, 2, dtype_of(word)), TOLERANCE[word]
    ranks = saved(folder, count)
    for name, method in methods().items():
        one = attributor.score(method, queries)
        for found in ranks:
            if found["scores"]:
                assert_scores(found["scores"][name], one.values, tolerance)
            for (scores, ids), best in zip(found["top"][name], (one.proponents(3), one.opponents(3)), strict=True):
                assert_scores(scores, best.scores, tolerance)
                assert torch.equal(ids, best.train_ids) or name == "KNNShapley"  # many of its scores are equal
        try:
            own = attributor.self_influence(method)
        except (ValueError, NotImplementedError):
            assert not any(name in found["self"] for found in ranks)
            continue
        for found in ranks:
            assert_scores(found["self"][name], own.values, tolerance)
    for found in ranks:
        assert_scores(found["group"], attributor.group(TracInCP(), [1, 9, 22], queries), tolerance)
        assert not found["reasons"][0]


@pytest.mark.slow
def test_two_processes_of_torchrun_score_as_one(tmp_path):
    words = ("full", "top", "single")
    run(tmp_path, "ddp", 2, *words, launcher=TORCHRUN)
    for word in words:
        assert_as_one(tmp_path / word, word, 2)
    folder = tmp_path / "full" / "influence" / "run-0" / "scores"
    assert {f"{name}.arrow" for name in methods()} <= {path.name for path in folder.iterdir()}
    stored = Scores.load(folder / "EKFAC.arrow")
    assert_scores(stored.values, saved(tmp_path / "full", 2)[0]["scores"]["EKFAC"], 0.0)
    errors = run(tmp_path, "by hand", 2, "single", launcher=TORCHRUN).stderr
    assert "Call `trainer.strategy.setup_environment()`" in errors
    one = attributor_of(tmp_path / "single", "single").score(TracInCP(), data(5, 2, torch.float32)).values
    found = [*tmp_path.glob("by-hand-*.pt")]
    assert len(found) == 4
    for path in found:
        assert_scores(torch.load(path), one, 1e-5)


@pytest.mark.slow
def test_three_processes_score_as_one(tmp_path):
    run(tmp_path, "ddp", 3, "full", "single")
    for word in ("full", "single"):
        assert_as_one(tmp_path / word, word, 3)


@pytest.mark.slow
def test_processes_that_are_spawned_leave_their_scores_to_the_one_that_started_them(tmp_path):
    for strategy in ("ddp_spawn", "ddp_notebook"):
        run(tmp_path / strategy, strategy, 2, "few")
        folder = tmp_path / strategy / "few"
        found, attributor = torch.load(folder / f"scores-{strategy}.pt"), attributor_of(folder, "few")
        assert found["run"] == str(folder / "influence" / "run-0")
        assert found["scores"].keys() == set(FEW)
        assert "GradientDot" in found["self"]
        for name in ("TracInCP", "EKFAC"):
            assert_scores(found["scores"][name], attributor.score(methods()[name], data(5, 2)).values, 1e-10)


@pytest.mark.slow
def test_what_happens_to_one_process_all_know(tmp_path):
    """It cannot compute a block of examples, or only smaller ones; it is interrupted between two questions; killed."""
    begun = time.monotonic()
    words = ("fails", "memory", "interrupted", "killed")
    done = run(tmp_path, "ddp", 2, *words, check=False)
    first, second = (found["reasons"][0] for found in saved(tmp_path / "fails", 2))
    assert first == second
    assert "this disk is gone" in first["GradientDot"]
    assert "this disk is gone" in done.stderr
    attributor = attributor_of(tmp_path / "memory", "full")
    for found in saved(tmp_path / "memory", 2):
        assert not found["reasons"][0]
        assert any("Memory did not suffice for blocks of 12" in note for note in found["notes"]["EKFAC"])
        for name in FEW:
            assert_scores(found["scores"][name], attributor.score(methods()[name], data(5, 2)).values, 1e-10)
    for found in saved(tmp_path / "interrupted", 2):
        assert set(found["scores"]) == {"TracInCP", "cosine"}
        assert all("was interrupted" in found["reasons"][0][name] for name in ("EKFAC", "GradientDot"))
    assert done.returncode != 0
    assert "which one no longer does" in (tmp_path / "lost.txt").read_text()
    assert time.monotonic() - begun < 250  # most of it are three fits


# ---- one process ----------------------------------------------------------------------------------------------------


def test_a_process_alone_has_everything():
    alone = Processes()
    assert alone.share(5) == range(5)
    assert not alone.shares(5)
    assert alone.gathered(3) == [3]
    assert torch.equal(alone.joined(torch.ones(2), 2), torch.ones(2))
    assert torch.equal(alone.summed(torch.ones(2)), torch.ones(2))
    assert torch.equal(alone.from_rank(torch.ones(2)), torch.ones(2))
    with pytest.raises(ValueError, match="mine"), alone.together():
        raise ValueError("mine")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 23])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_a_partition(n, count):
    shares = [Processes(rank, count).share(n) for rank in range(count)]
    if n < count:
        assert shares == [range(n)] * count
    else:
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_work_is_dealt_out_evenly(count):
    costs = [8.0, 1.0, 27.0, 1.0, 64.0, 8.0]
    ranks = Processes(0, count).dealt(costs)
    loads = [sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(count)]
    assert max(loads) == max(64.0, sum(costs) if count == 1 else 0)
    assert Processes(count - 1, count).dealt(costs) == ranks


@pytest.mark.parametrize("columns", [1, 4, 11, 12, 100])
@pytest.mark.parametrize(("n", "count"), [(23, 2), (23, 3), (8, 3), (2, 2)])
def test_all_processes_have_as_many_tiles(n, count, columns):
    found = [Share(range(5), Processes(rank, count).share(n), (5, n)).tiles(columns, count) for rank in range(count)]
    assert len({len(tiles) for tiles in found}) == 1
    assert [i for tiles in found for ids in tiles for i in ids] == list(range(n))
    assert all(len(ids) <= columns for tiles in found for ids in tiles)
    assert Share(range(5), range(n), (5, n)).tiles(columns, 1)[0] == range(min(n, columns))


def test_a_trainer_that_is_not_connected_is_one_process():
    class Two:
        world_size = 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processes_of(Two()).count == 1
        assert processes_of(None).count == 1


def test_processes_that_are_there_and_not_connected_are_told_how():
    class Environment:
        creates_processes_externally = True

    class Strategy:
        cluster_environment = Environment()

    class Two:
        world_size, strategy = 2, Strategy()

    with pytest.warns(UserWarning, match="setup_environment"):
        assert processes_of(Two()).count == 1


def test_the_results_of_processes_that_have_ended_are_those_of_the_newest_fit_with_this_callback(tmp_path):
    """As after `ddp_spawn`, where the callback that trains is a copy."""
    left = Influence({"a name/of mine": GradientDot()}, Indexed(3), tmp_path, self_influence=True, max_cost=1e9)
    trained, other = pickle.loads(pickle.dumps(left)), copy.deepcopy(left)
    assert left.run_dir is None
    fit(Net(), loader(), trained, max_epochs=1)
    assert left.run_dir == trained.run_dir
    for found, expected in (left.scores, trained.scores), (left.self_scores, trained.self_scores):
        assert torch.equal(found["a name/of mine"].values, expected["a name/of mine"].values)
    with pytest.raises(KeyError, match="which have ended, left no file of it"):
        left.self_scores["labels"]
    assert other.run_dir is None
    assert not other.scores
