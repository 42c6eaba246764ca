"""A bit flipped or a cut in any file: never other numbers, never an abort, and `verify` names the file."""

import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from test_formats import FIXTURES, make, written

from lightning_influence import LeaveOneOut, MissingEvidence, Refit, Scores, SelfScores, TracInCP
from lightning_influence.cli import main

NEWEST = FIXTURES / "format-2"


def of_method(name):
    return lambda folder: make.attributor(folder).score(make.METHODS[name], make.data(3, 1)).values


def of_bank(folder):
    ask = make.attributor(folder, refit=Refit(dirpath=str(folder / "bank")))
    return ask.score(LeaveOneOut(), make.data(3, 1)).values


def of_scores(name, kind=Scores):
    def read(folder):
        scores = kind.load(folder / name)
        strongest = scores.proponents(2).scores if kind is Scores else scores.top(3).scores
        numbers = [scores.train_ids, strongest, *([] if name == "top_k.arrow" else [scores.values])]
        return torch.cat([n.double().flatten() for n in numbers])

    return read


KINDS = {
    "runs/run-0/manifest.json": of_method("TracInCP"),
    "runs/run-0/checkpoints/step-00000006.pt": of_method("TracInCP"),
    "runs/run-0/steps/00000001.arrow": of_method("TracIn"),
    "runs/run-0/curvature/*": of_method("EKFAC"),
    "runs/run-0/features/net.2-step-6.arrow": of_method("RepresenterPoints"),
    "runs/run-0/features/*.head.arrow": of_method("RepresenterPoints"),
    "runs/run-0/trackers/*/*.pt": of_method("HyDRA"),
    "TracInCP.arrow": of_scores("TracInCP.arrow"),
    "top_k.arrow": of_scores("top_k.arrow"),
    "self.arrow": of_scores("self.arrow", SelfScores),
    "bank/bank.json": of_bank,
    "bank/models-000000.arrow": of_bank,
}


def damaged(content, chance):
    """The content with a bit flipped, or cut short."""
    if chance.random() < 0.5:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    # The heads and ends of files decide how the rest is read: as many flips there as in the middle.
    near = chance.choice([chance.randrange(len(content)), chance.randrange(min(512, len(content)))])
    at = near if chance.random() < 0.7 else len(content) - 1 - near
    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def check_damage(pattern, tmp_path, times, capsys):
    folder = Path(shutil.copytree(NEWEST, tmp_path / "files"))
    (path,) = folder.glob(pattern)
    content, expected = path.read_bytes(), KINDS[pattern](folder)
    chance = random.Random(pattern)
    for _ in range(times):
        path.write_bytes(damaged(content, chance))
        whole = folder / "runs" if "runs" in pattern else path.parent if "bank" in pattern else path
        capsys.readouterr()
        assert main(["verify", str(whole)]) == 1
        printed = capsys.readouterr()
        assert path.name in printed.out + printed.err
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = KINDS[pattern](folder)
        except (MissingEvidence, ValueError, OSError) as error:
            assert path.name in str(error) or path.parent.name in str(error)  # noqa: PT017
        else:  # it was computed again
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        for other in folder.rglob("*"):
            if other.is_file() and not (NEWEST / other.relative_to(folder)).is_file():
                other.unlink()
        for other in NEWEST.rglob("*"):
            if other.is_file() and (folder / other.relative_to(NEWEST)).read_bytes() != other.read_bytes():
                shutil.copy(other, folder / other.relative_to(NEWEST))


@pytest.mark.parametrize("pattern", KINDS)
def test_a_few_damaged_files(pattern, tmp_path, capsys):
    check_damage(pattern, tmp_path, 5, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", KINDS)
def test_many_damaged_files(pattern, tmp_path, capsys):
    check_damage(pattern, tmp_path, 200, capsys)


def test_the_numbers_are_those_of_the_fixture():
    for name in make.METHODS:
        expected = torch.tensor(written(NEWEST)[name], dtype=torch.float64)
        torch.testing.assert_close(Scores.load(NEWEST / f"{name}.arrow").values, expected, rtol=0, atol=0)
    assert TracInCP() == make.METHODS["TracInCP"]
