"""A full disk: the fit goes on, no scores of half a fit come out, and each error names its file."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from capture.test_resume import ENVIRONMENT

PROGRAM = Path(__file__).parent / "full_disk.py"
# A namespace of its own, where anybody may mount: what was mounted is gone with it.
MOUNTED = 'mount -t tmpfs -o size=400k tmpfs "$1" && shift && exec "$@"'


def can_mount(folder):
    """Why this system cannot mount a small file system of its own; None where it can."""
    if shutil.which("unshare") is None:
        return "no `unshare`"
    done = subprocess.run(mounted(folder, ["true"]), capture_output=True, text=True, check=False)
    return done.stderr.strip() or None


def mounted(folder, command):
    return ["unshare", "-rm", "sh", "-ec", MOUNTED, "sh", str(folder), *command]


def check(command):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.slow
def test_a_small_file_system(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if (why := can_mount(small)) is not None:
        pytest.skip(f"no file system of its own can be mounted here: {why}")
    check(mounted(small, [sys.executable, str(PROGRAM), str(small)]))


@pytest.mark.slow
def test_files_that_cannot_grow(tmp_path):
    (tmp_path / "limited").mkdir()
    check([sys.executable, str(PROGRAM), str(tmp_path / "limited"), "limit"])
