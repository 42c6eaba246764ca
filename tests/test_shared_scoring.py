"""Scores by several real processes equal those of one, and what one process refuses all refuse."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fits import seeded
from gloo_score import Digits, N, data, methods

from lightning_influence import Attributor, Scores, TracInCP, Trajectory
from lightning_influence.attribution.accumulators import Share
from lightning_influence.processes import Processes, processes_of

PROGRAM = Path(__file__).parent / "gloo_score.py"


def started(folder, *arguments):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def run(folder, *arguments):
    process = started(folder, *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def saved(folder, count):
    return [torch.load(folder / f"scores-{rank}.pt") for rank in range(count)]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


def assert_as_one(folder, count):
    """Every process has what one process computes of the same run."""
    attributor = Attributor(seeded(Digits), data(N, 1), Trajectory.load(folder / "influence"))
    ranks = saved(folder, count)
    for name, method in methods().items():
        one = attributor.score(method, data(5, 2))
        for found in ranks:
            if found["scores"]:
                assert_close(found["scores"][name], one.values)
            for (scores, ids), best in zip(found["top"][name], (one.proponents(3), one.opponents(3)), strict=True):
                assert_close(scores, best.scores)
                assert torch.equal(ids, best.train_ids) or name == "KNNShapley"  # many of its scores are equal
        try:
            own = attributor.self_influence(method)
        except (ValueError, NotImplementedError):
            assert not any(name in found["self"] for found in ranks)
            continue
        for found in ranks:
            assert_close(found["self"][name], own.values)
    for found in ranks:
        assert_close(found["group"], attributor.group(TracInCP(), [1, 9, 22], data(5, 2)))
        assert not found["reasons"][0]
    return ranks


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    run(tmp_path, "ddp", 2)
    assert_as_one(tmp_path, 2)
    files = sorted(path.name for path in (tmp_path / "influence" / "run-0" / "scores").iterdir())
    assert {f"{name}.arrow" for name in methods()} <= set(files)
    stored = Scores.load(tmp_path / "influence" / "run-0" / "scores" / "EKFAC.arrow")
    assert_close(stored.values, saved(tmp_path, 2)[0]["scores"]["EKFAC"])


@pytest.mark.slow
@pytest.mark.parametrize("words", [("ddp", 3), ("ddp", 2, "top")])
def test_more_processes_and_the_strongest_few(tmp_path, words):
    run(tmp_path, *words)
    assert_as_one(tmp_path, words[1])


@pytest.mark.slow
def test_processes_that_are_forked_leave_their_scores_in_files(tmp_path):
    run(tmp_path, "ddp_fork", 2)
    attributor = Attributor(seeded(Digits), data(N, 1), Trajectory.load(tmp_path / "influence"))
    for name in ("TracInCP", "KNNShapley"):
        found = Scores.load(tmp_path / "influence" / "run-0" / "scores" / f"{name}.arrow")
        assert_close(found.values, attributor.score(methods()[name], data(5, 2)).values)


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path):
    """One of them cannot compute a block of examples."""
    errors = run(tmp_path, "ddp", 2, "fails")
    first, second = (found["reasons"][0] for found in saved(tmp_path, 2))
    assert first == second
    assert "this disk is gone" in errors
    assert "this disk is gone" in first["GradientDot"]


@pytest.mark.slow
def test_an_interrupt_of_one_process_between_two_questions_ends_the_scoring_of_all(tmp_path):
    run(tmp_path, "ddp", 2, "interrupted")
    for found in saved(tmp_path, 2):
        assert set(found["scores"]) == {"TracInCP", "cosine"}
        assert all("was interrupted" in found["reasons"][0][name] for name in methods().keys() - found["scores"].keys())


@pytest.mark.slow
def test_a_killed_process_takes_the_others_down(tmp_path):
    begun = time.monotonic()
    process = started(tmp_path, "ddp", 2, "killed")
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - begun < 120


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

    assert processes_of(Two()).count == 1
    assert processes_of(None).count == 1
