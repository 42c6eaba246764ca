"""Checkpoints without the optimizer's state: what reads it, what does without, and what was said of their weight."""

import logging
import re

import oracles
import pytest
import pytorch_lightning as pl
from fits import Double, Indexed, fit, loader, seeded

from lightning_influence import (
    SOURCE,
    Attributor,
    ExactGGN,
    HyDRA,
    Influence,
    InfluenceFunction,
    MissingEvidence,
    TracIn,
    Trajectory,
)

QUERIES = Indexed(3)
ADAMW, MOMENTUM = {"optimizer": "adamw", "lr": 0.01}, {"momentum": 0.9}


def recorded(folder, options, epochs=3, methods=(), **how):
    influence, module = Influence(methods, dirpath=folder, **how), seeded(Double, **options)
    fit(module, loader(Indexed(8)), influence, max_epochs=epochs)
    return influence


@pytest.mark.slow
@pytest.mark.parametrize("options", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_scores_are_the_same_without_states_between(options, tmp_path):
    every, some = (recorded(tmp_path / keep, options, keep=keep) for keep in ("all", "needed"))
    assert [(c.step, c.whole) for c in some.trajectory.checkpoints] == [(0, True), (2, False), (4, False), (6, True)]
    assert all(c.whole for c in every.trajectory.checkpoints)
    assert not some.trajectory.checkpoints[1].load().optimizer
    assert every.trajectory.checkpoints[1].load().optimizer
    for method in (TracIn(), HyDRA()):
        found, want = (each.attributor.score(method, QUERIES).values for each in (some, every))
        oracles.assert_scores(found, want, 1e-9)


def test_states_that_are_read_are_kept_or_asked_for(tmp_path):
    with pytest.raises(MissingEvidence, match=r"none at step 4.*keep='all'"):
        recorded(tmp_path, ADAMW, keep="needed").attributor.score(SOURCE(segments=1), QUERIES)
    methods = recorded(tmp_path, ADAMW, keep="needed", methods=[SOURCE()])
    assert all(c.whole for c in methods.trajectory.checkpoints)
    with pytest.raises(ValueError, match="`keep` to be one of 'all', 'needed', got 'some'"):
        Influence(keep="some")


@pytest.mark.parametrize("how", [{}, {"keep": "needed"}, {"keep_last": 1}, {"every_n_train_steps": 3}], ids=repr)
def test_the_weight_of_checkpoints_is_said_before_the_fit(how, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        influence = recorded(tmp_path, {"optimizer": "adamw"}, epochs=2, **how)
    said = next(m for m in caplog.messages if "checkpoint of this fit takes" in m)
    checkpoints = influence.trajectory.checkpoints
    count, total = re.search(r"; (\d+) of them about (\d+) kB", said).groups()
    assert int(count) == len(checkpoints)
    assert int(total) == pytest.approx(sum(c.size for c in checkpoints) / 1e3, rel=0.1)
    if how:
        return
    caplog.clear()
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        recorded(tmp_path, {}, epochs=1, verbose=False)
    assert not any("checkpoint" in m for m in caplog.messages)


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


class StopsLate(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch == 1


def test_a_fit_that_is_stopped_after_its_last_checkpoint_keeps_the_state(tmp_path):
    influence = Influence(dirpath=tmp_path, keep="needed")
    fit(seeded(Double, **ADAMW), loader(), influence, StopsLate(), max_epochs=5)
    first, middle, last = influence.trajectory.checkpoints
    assert [c.whole for c in (first, middle, last)] == [True, False, True]
    assert last.load().optimizer
    assert {file.name for file in last.path.parent.iterdir()} == {c.path.name for c in (first, middle, last)}
    assert "scheduled" in (last.path.parents[1] / "manifest.json").read_text().rpartition(last.path.name)[2]


class Fails(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            raise OSError("killed")


def test_scores_of_a_fit_that_broke_off_say_that_the_state_is_missing(tmp_path):
    with pytest.raises(OSError, match="killed"):
        fit(
            seeded(Double, **ADAMW),
            loader(Indexed(8)),
            Influence(dirpath=tmp_path, keep="needed"),
            Fails(),
            max_epochs=5,
        )
    trajectory = Trajectory.load(tmp_path)
    assert not trajectory.checkpoints[-1].whole
    scores = Attributor(seeded(Double), Indexed(8), trajectory, check_data=False).score(
        InfluenceFunction(ExactGGN()), QUERIES
    )
    assert any("its state is not known; `Influence(keep='all')` keeps it" in note for note in scores.notes)


def test_a_fit_without_an_end_has_no_total(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        fit(seeded(Double), loader(), Influence(dirpath=tmp_path), Stops(), max_epochs=-1)
    assert any("How many there will be is not known" in m for m in caplog.messages)
