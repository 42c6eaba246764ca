"""Files that somebody changed and signed again, or put in the place of others: our errors, soon, and little memory."""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from test_formats import FIXTURES, make

from lightning_influence import (
    InfluenceFunction,
    LeaveOneOut,
    MissingEvidence,
    Refit,
    Scores,
    TracIn,
    TracInCP,
    Trajectory,
)
from lightning_influence.cli import main
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.files import checked_json
from lightning_influence.replay.replay import DriftError
from lightning_influence.trajectory.files import read_verified

NEWEST = FIXTURES / "format-2"
SECONDS, MEGABYTES = 5, 200


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(NEWEST, tmp_path / "files"))


class StillBusy(BaseException):
    """No error that the package may take for one of a file."""


@pytest.fixture(autouse=True)
def soon_and_small():
    """Nothing here may take long or much memory."""

    def late(*_):
        raise StillBusy(f"after {SECONDS} seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def attempt(call, path):
    """The result, or None where there was one of our errors, which names the file."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except (MissingEvidence, ValueError) as error:
        named = str(path) in str(error) or path.name in str(error) or str(path.parent) in str(error)
        assert named, f"{type(error).__name__}: {error}"  # noqa: PT017
        return None
    finally:
        signal.alarm(0)


# ---- manifests ----

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = json.loads("[" * 500 + "]" * 500)
ODD = [None, True, False, 0, -1, 1, 7, 10**7, 2**63, 10**400, 1.5, -0.0, float("nan"), float("inf")]
ODD += ["", "a", "\0", "\ud800", "/dev/zero", "../../../etc/passwd", "..\\x", "C:\\x", "x" * 100_000]
ODD += [[], {}, [[]], [{}], {"a": {}}, NESTED]


def places(value, path=()):
    """Every place in a manifest, at any depth."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def mutated(manifest, chance):
    """Something is missing, of another kind, doubled, or moved."""
    changed = copy.deepcopy(manifest)
    path = chance.choice([p for p in places(changed) if p])
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    kind = chance.choice(["replace", "replace", "remove", "double", "shuffle", "add"])
    at = owner[path[-1]]
    if kind == "remove":
        del owner[path[-1]]
    elif kind == "double" and isinstance(at, list):
        owner[path[-1]] = at + copy.deepcopy(at)
    elif kind == "shuffle" and isinstance(at, list):
        owner[path[-1]] = at[::-1]
    elif kind == "add" and isinstance(owner, dict):
        owner[chance.choice(["x", "broken", "removed", "parent", "best", "averaged"])] = chance.choice(ODD)
    else:
        owner[path[-1]] = chance.choice(ODD)
    return changed


def resign(path, content):
    path.write_bytes(checked_json.encode(content))


def questions(folder):
    """What reads every part of a manifest."""
    trajectory = Trajectory.load(folder / "runs")
    ask = make.attributor(folder)
    for method in (TracInCP(), TracIn(), InfluenceFunction(EKFAC())):
        # A fit of other data, or with other options, is refused in its own words.
        with contextlib.suppress(MissingEvidence, ValueError, DriftError):
            ask.score(method, make.data(2, 1))
    return repr(trajectory)


def fuzz(folder, times, seed):
    path = folder / "runs" / "run-0" / "manifest.json"
    manifest = checked_json.decode(path.read_bytes())
    # Its text holds a manifest of its own.
    manifest["data"] = json.loads(manifest["data"])
    chance, read = random.Random(seed), 0
    for _ in range(times):
        changed = mutated(manifest, chance)
        if "data" in changed and isinstance(changed["data"], dict):
            changed["data"] = json.dumps(changed["data"])
        try:
            resign(path, changed)
        except (ValueError, TypeError):
            continue
        found = attempt(lambda: questions(folder), path)
        read += found is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(["verify", str(folder / "runs")]) in (0, 1)
            assert main(["show", str(folder / "runs")]) in (0, 1)
    return read


def test_a_few_mutated_manifests(folder, capsys):
    assert fuzz(folder, 25, 0) < 25


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_mutated_manifests(folder, capsys, seed):
    assert fuzz(folder, 150, seed) < 150


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"1e999",
        b"\xff\xfe",
        DEEP.encode(),
        b'{"manifest": ' + DEEP.encode() + b', "crc32": 1}',
        b"NaN",
    ],
    ids=lambda text: str(text[:12]),
)
def test_files_that_are_no_manifests(folder, text):
    for path, call in (
        (folder / "runs" / "run-0" / "manifest.json", lambda: Trajectory.load(folder / "runs")),
        (folder / "bank" / "bank.json", lambda: bank(folder)),
    ):
        intact = path.read_bytes()
        path.write_bytes(text)
        assert attempt(call, path) is None
        path.write_bytes(intact)


def bank(folder):
    ask = make.attributor(folder, refit=Refit(dirpath=str(folder / "bank")))
    return ask.score(LeaveOneOut(), make.data(3, 1)).values


def test_mutated_banks(folder):
    path, expected, chance = folder / "bank" / "bank.json", bank(folder), random.Random(0)
    content = checked_json.decode(path.read_bytes())
    for _ in range(40):
        changed = mutated(content, chance)
        resign(path, changed)
        found = attempt(lambda: bank(folder), path)
        if found is not None:
            torch.testing.assert_close(found, expected)


# ---- runs that resume each other ----


def link(folder, run, to):
    return {"run": f"run-{to}", "path": str(folder / "runs" / f"run-{to}"), "id": str(to), "step": 3}


@pytest.mark.parametrize("circle", [1, 2, 3])
def test_runs_that_resume_themselves(folder, circle):
    for number in range(circle):
        run = folder / "runs" / f"run-{number}"
        if number:
            shutil.copytree(folder / "runs" / "run-0", run)
        manifest = checked_json.decode((run / "manifest.json").read_bytes())
        manifest |= {"id": str(number), "parent": link(folder, number, (number + 1) % circle)}
        resign(run / "manifest.json", manifest)
    assert attempt(lambda: Trajectory.load(folder / "runs" / "run-0"), folder / "runs" / "run-0") is None


def test_a_long_chain_of_runs(folder):
    """One run after the other, more than Python may call: a text, not a RecursionError."""
    first = folder / "runs" / "run-0"
    manifest = checked_json.decode((first / "manifest.json").read_bytes())
    manifest |= {"checkpoints": [], "steps": [], "data": None}
    for number in range(1500):
        run = folder / "runs" / f"run-{number}"
        run.mkdir(exist_ok=True)
        parent = link(folder, number, number - 1) if number else None
        resign(run / "manifest.json", manifest | {"id": str(number), "parent": parent})
    attempt(lambda: Trajectory.load(folder / "runs"), folder / "runs" / "run-1499")


# ---- devices, pipes, loops and holes ----

FILES = {
    "runs/run-0/manifest.json": lambda folder: Trajectory.load(folder / "runs"),
    "runs/run-0/checkpoints/step-00000006.pt": lambda folder: make.attributor(folder).score(TracInCP(), make.data(2)),
    "runs/run-0/steps/00000001.arrow": lambda folder: Trajectory.load(folder / "runs"),
    "runs/run-0/trackers/*/*.pt": lambda folder: make.attributor(folder).score(make.METHODS["HyDRA"], make.data(2, 1)),
    "runs/run-0/curvature/*": lambda folder: make.attributor(folder).score(make.METHODS["EKFAC"], make.data(2, 1)),
    "runs/run-0/features/net.2-step-6.arrow": lambda folder: make.attributor(folder).score(
        make.METHODS["RepresenterPoints"], make.data(2, 1)
    ),
    "TracInCP.arrow": lambda folder: Scores.load(folder / "TracInCP.arrow"),
    "bank/bank.json": bank,
    "bank/models-000000.arrow": bank,
}  # fmt: skip


def endless(path, kind):
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(10**12)


@pytest.mark.parametrize("kind", ["device", "pipe", "loop", "hole"])
@pytest.mark.parametrize("pattern", FILES)
def test_what_is_no_file_is_never_read(folder, pattern, kind, capsys):
    (path,) = folder.glob(pattern)
    try:
        endless(path, kind)
    except OSError as error:
        pytest.skip(f"this file system has no such file: {error}")
    signal.alarm(SECONDS)
    try:
        attempt_any = FILES[pattern]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt_any(folder)  # it was computed or trained again
    except (MissingEvidence, ValueError, OSError) as error:
        assert path.name in str(error) or str(path.parent) in str(error)  # noqa: PT017
    signal.alarm(SECONDS)
    main(["verify", str(folder / ("bank" if "bank" in pattern else "runs"))])
    signal.alarm(0)


def test_a_manifest_that_lists_a_hole(folder):
    run = folder / "runs" / "run-0"
    manifest = checked_json.decode((run / "manifest.json").read_bytes())
    with (run / "checkpoints" / "hole.pt").open("wb") as file:
        file.truncate(10**12)
    for entry in manifest["checkpoints"]:
        entry |= {"file": "checkpoints/hole.pt", "size": 10**12}
    resign(run / "manifest.json", manifest)
    assert (
        attempt(lambda: make.attributor(folder).score(TracInCP(), make.data(2)), run / "checkpoints" / "hole.pt")
        is None
    )


@pytest.mark.parametrize("path", ["/dev/zero", "../../x", "..", "checkpoints/../../x", "..\\x", "C:\\x", "\0", ""])
def test_paths_that_leave_the_run(folder, path):
    file = folder / "runs" / "run-0" / "manifest.json"
    manifest = checked_json.decode(file.read_bytes())
    for name in ("checkpoints", "steps", "averaged"):
        changed = copy.deepcopy(manifest)
        entry = copy.deepcopy(changed["checkpoints"][0])
        changed[name] = entry | {"file": path} if name == "averaged" else [changed[name][0] | {"file": path}]
        resign(file, changed)
        assert attempt(lambda: Trajectory.load(folder / "runs"), file) is None


@pytest.mark.parametrize(
    "segment",
    [
        "/dev/zero",
        "../run-0/trackers/a/visits-00000000.pt",
        "run-0/trackers/a/../../x/visits-0.pt",
        "run-0/manifest.json",
    ],
)
def test_segments_of_a_tracker_that_leave_it(tmp_path, segment):
    from lightning_influence.tracking.visits import _inside

    with pytest.raises(MissingEvidence, match="Expected a tracker's file"):
        _inside(tmp_path, segment)


def test_segments_of_this_run_and_of_one_that_was_resumed(tmp_path):
    from lightning_influence.tracking.visits import _inside

    for segment in (
        "run-0/trackers/HyDRA-1/visits-00000000.pt",
        f"{tmp_path}/run-1/trackers/a/visits-1.crc01234567.pt",
    ):
        assert _inside(tmp_path, segment) == tmp_path / segment


def test_a_file_of_models_by_another_name_is_passed_over(folder):
    expected = bank(folder)
    (folder / "bank" / "models-x.arrow").write_bytes(b"x")
    assert bank(folder).equal(expected)


def test_sizes_are_compared_before_the_file_is_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(MissingEvidence, match="x"):
        read_verified(tmp_path / "x", 10, 0)


def test_opening_large_scores_reads_little(tmp_path, monkeypatch):
    """1,000,000 x 100 in proportion: what is checked when a file is opened does not grow with it."""
    from lightning_influence.files import sealed

    checked = []
    original = sealed._checksum
    monkeypatch.setattr(sealed, "_checksum", lambda part: (checked.append(len(part)), original(part))[1])
    for count in (100_000, 1_000_000):
        about = {"settings": {}, "units": "loss", "notes": [], "checkpoints": (1,), "method": "TracInCP"}
        ids = {"train_ids": torch.arange(count), "query_ids": torch.arange(10)}
        path = Scores(torch.zeros(10, count), None, **ids, **about).save(tmp_path / str(count))
        checked.clear()
        scores = Scores.load(path)
        assert sum(checked) <= 2 * sealed.CHUNK
        assert scores.values.shape == (10, count)
        assert sum(checked) >= 40 * count
