"""Every example runs as a user runs it, asserts its own claim, and says where its output is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "images.py": ("strongest proponent of their own class", "images_output/influence.html"),
    "texts.py": ("flipped labels are in the first fifth", "texts_output/influence.html"),
    "table.py": ("flipped labels are in the first fifth", "table_output/influence.html"),
    "quickstart.py": ("tensorboard --logdir quickstart_output", "strongest opponents"),
    "your_own_method.py": ("keeps every promise",),
    "influence_vs_retraining.py": ("Noise ceiling", "TracInCP, cosine (GAS)", "a second call trains none"),
    "lightning_cli.py": ("wrong labels are in the first fifth", "lightning-influence show"),
    "from_checkpoints.py": ("flipped labels are in the first fifth",),
}


def run(folder, name, *arguments):
    # One thread: the models are tiny, and threads that wait for busy cores are slower than none.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_example(tmp_path, name):
    output = run(tmp_path, name, *(["--quick"] if '"--quick"' in (EXAMPLES / name).read_text() else []))
    for words in SAYS[name]:
        assert words in output
    if name == "quickstart.py":
        assert_written(tmp_path / "quickstart_output")


def assert_written(out):
    assert (out / "wrong_prediction.png").stat().st_size > 5_000
    names = {path.name for path in out.glob("digits/version_0/influence/run-0/scores/*")}
    assert names == {"labels.self.arrow", "TracInCP.arrow", "TracInCP.self.arrow"}
    assert list(out.glob("digits/version_0/events.*"))


@pytest.mark.slow
def test_quickstart_holds_over_five_seeds(tmp_path):
    assert "over 5 seeds" in run(tmp_path, "quickstart.py", "--seeds", "5")
