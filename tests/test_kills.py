"""Processes that are killed or interrupted while they write: nothing is lost or half read, what they leave is removed.

Each process is a fork of this one, which would otherwise spend its time on imports.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from fits import Indexed, Net, fit, loader, seeded
from test_formats import FIXTURES, make

from lightning_influence import GradientDot, Influence, MissingEvidence, Scores, Trajectory
from lightning_influence.cli import main
from lightning_influence.files.atomic import left_over, whole
from lightning_influence.trajectory.files import MANIFEST

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no `fork`")
TIMES = 20


def scores_of(seed):
    values = torch.full((200, 300), float(seed))
    ids = {"train_ids": torch.arange(300), "query_ids": torch.arange(200)}
    return Scores(values, None, **ids, method="TracInCP", settings={}, units="loss", notes=[], checkpoints=(1,))


def again(folder, name, method):
    """Prepare once more what a method keeps beside its run."""
    shutil.rmtree(folder / "runs" / "run-0" / name, ignore_errors=True)
    return make.attributor(folder).score(make.METHODS[method], make.data(3, 1)).values


def save(folder):
    for seed in (1, 2):
        scores_of(seed).save(folder / "saved.arrow", overwrite=True)


def report(folder):
    make_page(folder / "page.html")


def make_page(path):
    Scores.load(FIXTURES / "format-2" / "TracInCP.arrow").report(path)


def score(folder):
    path = folder / "scored.arrow"
    path.unlink(missing_ok=True)
    make.attributor(folder).score(make.METHODS["TracInCP"], make.data(3, 1), path=path)


def a_fit(folder):
    fit(seeded(Net), loader(), Influence([GradientDot()], Indexed(3), dirpath=folder / "fits", every_n_train_steps=1))


def check_saved(folder):
    if (folder / "saved.arrow").exists():
        values = Scores.load(folder / "saved.arrow").values
        assert values.unique().numel() == 1


def check_page(folder):
    if (folder / "page.html").exists():
        assert (folder / "page.html").read_text().rstrip().endswith("</html>")


def check_scored(folder):
    if (folder / "scored.arrow").exists():
        torch.testing.assert_close(Scores.load(folder / "scored.arrow").values, written("TracInCP"))


def check_fits(folder):
    for run in (folder / "fits").glob("run-*"):
        if (run / MANIFEST).exists():
            trajectory = Trajectory.load(run)
            assert all(checkpoint.load() for checkpoint in trajectory.checkpoints)
            assert main(["verify", str(run)]) == 0


def written(method):
    return Scores.load(FIXTURES / "format-2" / f"{method}.arrow").values


def check_method(method):
    def check(folder):
        assert main(["verify", str(folder / "runs")]) == 0
        found = make.attributor(folder).score(make.METHODS[method], make.data(3, 1))
        assert not any("damaged" in note for note in found.notes)
        torch.testing.assert_close(found.values, written(method), rtol=1e-9, atol=1e-12)

    return check


WORK = {
    "fit": (a_fit, check_fits, 0.4),
    "scoring": (score, check_scored, 0.2),
    "save": (save, check_saved, 0.05),
    "report": (report, check_page, 0.1),
    "curvature": (lambda f: again(f, "curvature", "EKFAC"), check_method("EKFAC"), 0.2),
    "features": (lambda f: again(f, "features", "RepresenterPoints"), check_method("RepresenterPoints"), 0.2),
}


def forked(work):
    """A process that does the work over and over."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:  # pragma: no cover - in the other process
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Lightning exits
            while True:
                work()
        os._exit(0)
    finally:
        os._exit(3)


def ended(pid, how, seconds=20):
    """Wait for a process; a first interrupt ends the scoring of a fit only, or is lost in a finaliser."""
    for k in range(int(seconds / 0.02)):
        if k % 25 == 24:
            os.kill(pid, how)
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            # An interrupt may come out of a library as another error, and a second one while the first is handled.
            other = {3 << 8} if how is signal.SIGINT else set()
            assert status in {0, signal.SIGKILL, signal.SIGINT, *other}, "the work failed"
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the process goes on")


def interrupted(name, how, times, tmp_path):
    work, check, longest = WORK[name]
    chance = random.Random(name)
    left = 0
    for k in range(times):
        folder = Path(shutil.copytree(FIXTURES / "format-2", tmp_path / str(k)))
        pid = forked(lambda folder=folder: work(folder))
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, how)
        ended(pid, how)
        found = left_over(folder)
        left += len(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(folder)
        main(["verify", str(folder), "--clean"]) if found else None
        main(["verify", str(folder / "runs"), "--clean"]) if found else None
        for path in found:
            if (folder / "runs") in path.parents:
                assert not path.exists()
    return left


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("name", WORK)
def test_a_kill_leaves_whole_files(name, how, tmp_path, capsys):
    interrupted(name, how, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("name", WORK)
def test_many_kills_leave_whole_files(name, how, tmp_path, capsys):
    interrupted(name, how, TIMES, tmp_path)


def halfway(path):
    with whole(path) as file:
        file.write(b"half")
        file.flush()
        time.sleep(60)


def test_what_a_killed_process_left_is_named_and_removed_and_a_live_one_is_left_alone(tmp_path, capsys):
    folder = Path(shutil.copytree(FIXTURES / "format-2" / "runs", tmp_path / "runs"))
    for part in ("scores", "features", "curvature", "trackers/HyDRA-f9dc0bf7", "steps", "checkpoints"):
        pids = [forked(lambda part=part, k=k: halfway(folder / "run-0" / part / f"new-{k}.arrow")) for k in range(2)]
        while len(list((folder / "run-0" / part).glob(".new*"))) < 2:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)
        (dead,) = (folder / "run-0" / part).glob(".new-0*")
        (alive,) = (folder / "run-0" / part).glob(".new-1*")
        assert main(["verify", str(folder)]) == 0
        said = capsys.readouterr().out
        assert f"left over: {dead}" in said
        assert str(alive) not in said
        assert main(["verify", str(folder), "--clean"]) == 0
        assert not dead.exists()
        assert alive.exists()
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
        alive.unlink()


@pytest.mark.slow
def test_threads_that_save_one_file_publish_whole_ones(tmp_path):
    """A thousand times, with readers beside them; containers with equal process ids are alike."""
    path, stop, seen = tmp_path / "one.arrow", threading.Event(), []
    both = [scores_of(1), scores_of(2)]
    both[0].save(path)

    def read():
        while not stop.is_set():
            values = Scores.load(path).values
            seen.append(float(values[0, 0]))
            assert bool((values == values[0, 0]).all())

    def write(scores):
        for _ in range(250):
            scores.save(path, overwrite=True)

    failed = []
    threading.excepthook, previous = lambda args: failed.append(args.exc_value), threading.excepthook
    try:
        readers = [threading.Thread(target=read) for _ in range(2)]
        writers = [threading.Thread(target=write, args=(both[k % 2],)) for k in range(4)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
    finally:
        threading.excepthook = previous
    assert not failed, failed[:3]
    assert set(seen) <= {1.0, 2.0}
    assert len(seen) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["one.arrow"]


def test_a_run_without_manifest_is_no_run(tmp_path):
    with pytest.raises(MissingEvidence):
        Trajectory.load(tmp_path)
