"""Curvatures kept on disk: made once, read for the same question only, made again where they are damaged."""

import os
from dataclasses import dataclass

import pytest
import torch
from case import Items, both, mlp
from torch.nn import functional as F
from traced import Still

from lightning_influence import Arnoldi, Attributor, ExactGGN, InfluenceFunction, LiSSA, Trajectory

torch.set_num_threads(1)
DATA = both(5)
made: list[str] = []


@dataclass(frozen=True)
class Counted(ExactGGN):
    def prepare(self, setting):
        made.append("")
        return super().prepare(setting)


@pytest.fixture
def fitted(tmp_path):
    torch.manual_seed(0)
    module = Still(mlp(), F.cross_entropy, decay=0.01, rate=0.2).double()
    trajectory = module.trained(DATA["train"](), tmp_path, batch_size=4, epochs=2)
    made.clear()
    return module, trajectory


def score(fitted, curvature=None, data=None, **options):
    module, trajectory = fitted
    attributor = Attributor(module, data or DATA["train"](), Trajectory.load(trajectory.path), **options)
    method = InfluenceFunction(curvature or Counted(), checkpoints=(1, 2))
    return attributor.score(method, DATA["queries"]())


def files(fitted):
    return sorted((fitted[1].path / "curvature").iterdir())


def test_a_second_question_reads_what_the_first_made(fitted):
    first = score(fitted)
    assert len(made) == len(files(fitted)) == 2  # one a checkpoint
    again = score(fitted, Counted(damping=first.figures["damping"]))  # another damping serves itself of the same matrix
    assert len(made) == 2
    assert not torch.equal(again.values, first.values)
    torch.testing.assert_close(score(fitted).values, first.values, rtol=0, atol=0)
    assert len(made) == 2


@pytest.mark.parametrize("curvature", [Arnoldi(steps=20), LiSSA()], ids=repr)
def test_what_was_read_is_what_was_made(fitted, curvature):
    first = score(fitted, curvature)
    torch.testing.assert_close(score(fitted, curvature).values, first.values, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["cut short", "a changed byte", "nothing", "another file"])
def test_a_damaged_file_is_made_again_and_said(fitted, damage):
    first = score(fitted)
    path = files(fitted)[0]
    content = path.read_bytes()
    spoiled = {
        "cut short": content[: len(content) // 2],
        "a changed byte": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        "nothing": b"",
        "another file": b"PK" + content,
    }
    path.write_bytes(spoiled[damage])
    again = score(fitted)
    assert len(made) == 3
    assert any("computed again: Expected a complete curvature" in note for note in again.notes)
    torch.testing.assert_close(again.values, first.values, rtol=0, atol=0)
    assert path.read_bytes() == content
    score(fitted)
    assert len(made) == 3


def test_a_file_of_other_weights_under_the_right_name_is_made_again_and_said(fitted):
    first = score(fitted)
    one, other = files(fitted)
    one.write_bytes(other.read_bytes())
    again = score(fitted)
    assert len(made) == 3
    assert any("got one with different losses, step, weights" in note for note in again.notes)
    torch.testing.assert_close(again.values, first.values, rtol=0, atol=0)


def test_a_module_that_lists_its_parameters_in_another_order_has_a_file_of_its_own(fitted):
    first = score(fitted)
    for part in fitted[0].net:
        for name in sorted(part._parameters):  # bias before weight
            part._parameters[name] = part._parameters.pop(name)
    torch.testing.assert_close(score(fitted).values, first.values, rtol=1e-10, atol=1e-12)
    assert len(made) == len(files(fitted)) == 4


@pytest.mark.slow
def test_other_data_parameters_losses_and_settings_have_files_of_their_own(fitted):
    score(fitted, Arnoldi(steps=5))
    changed = DATA["train"]().items
    changed[0] = (changed[0][0] + 1, changed[0][1])
    score(fitted, Arnoldi(steps=5), data=Items(changed), check_data=False)
    score(fitted, Arnoldi(steps=5), parameters="net.2.*")
    score(fitted, Arnoldi(steps=6))
    score(fitted, Arnoldi(steps=5), loss=lambda m, b: 2 * F.cross_entropy(m(b[0]), b[1], reduction="none"))
    assert len(files(fitted)) == 10
    score(fitted, Arnoldi(steps=5, rank=2, complement="drop", damping=1.0))
    assert len(files(fitted)) == 10


def test_a_folder_that_cannot_be_written_costs_the_next_question_time_only(fitted):
    (fitted[1].path / "curvature").write_text("in the way")
    first = score(fitted)
    assert any("could not be stored on disk" in note for note in first.notes)
    assert len(made) == 2


def test_nothing_half_written_is_left_by_an_interrupted_write(fitted, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        if "curvature" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(fitted)
    found = score(fitted)
    assert not any("computed again" in note for note in found.notes)
    assert len(made) == 3
