"""How far a replay is from its fit: nothing where all random states were captured, else measured, with its cause."""

import re

import pytest
import torch
from oracles import assert_scores
from oracles_dynamic import influence
from torch.utils.data import RandomSampler

from lightning_influence import Attributor, HyDRA, TracIn
from lightning_influence.replay.replay import DriftError, Replay
from replay.runs import N, fitted, joint

KERNEL = r"Likely causes: the fit's attention ran in a fused kernel, its replay in the math kernel.*something else"


def plain(**settings):
    return HyDRA(**{"checks": 0, **settings})


def replayed(fit, max_drift=0.1, train=None):
    """The replay of a fit, run."""
    attributor = Attributor(fit.module, train or fit.data, fit.influence.trajectory, fit.trainer)
    with attributor._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory, max_drift)
        replay.run()
    return replay


@pytest.mark.parametrize("net", ["mlp", "dropout"])
def test_dropout_and_augmentation_of_the_main_process_are_repeated_bit_by_bit(net, tmp_path):
    fit = fitted(tmp_path, net=net, noisy=True, dtype=torch.float32, epochs=3)
    assert replayed(fit).drifts == {3: 0.0, 6: 0.0, 9: 0.0}
    looks = [x for _, (x, *_), _ in fit.run.windows[0]], [x for _, (x, *_), _ in fit.run.windows[-1]]
    assert not torch.equal(looks[0][0][:2].sort(0).values, looks[1][0][:2].sort(0).values)


def test_the_same_batch_in_another_epoch_has_other_looks(tmp_path):
    fit = fitted(tmp_path, noisy=True, dtype=torch.float32, loader={"shuffle": False})
    assert fit.module.seen[:3] == fit.module.seen[3:]
    assert replayed(fit).drifts == {3: 0.0, 6: 0.0}


def test_an_example_drawn_twice_into_a_batch_has_both_its_looks(tmp_path):
    loader = {"shuffle": False, "sampler": RandomSampler(range(N), replacement=True, num_samples=N)}
    fit = fitted(tmp_path, noisy=True, loader=loader)
    assert any(len(set(ids)) < len(ids) for ids in fit.module.seen)
    for loss in (None, joint):
        found = fit.attributor(loss).score(plain(), fit.queries).values
        assert_scores(found, influence(fit.run, fit.query_losses, N), 1e-9)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*use of fork")
def test_augmentation_in_workers_drifts_at_every_checkpoint_and_says_why(tmp_path):
    fit = fitted(tmp_path, noisy=True, loader={"num_workers": 2})
    cause = r"augmentation\), in worker processes.*`num_workers=0` it is repeated exactly"
    with pytest.raises(DriftError, match=r"weights of step \d, within 0\.1 .*" + cause):
        fit.attributor().score(plain(), fit.queries)
    replay = replayed(fit, max_drift=100.0)
    assert sorted(replay.drifts) == [3, 6]
    least, most = sorted(replay.drifts.values())
    assert 0.1 < least < most == replay.drift
    for method in (plain(max_drift=100.0), TracIn(max_drift=100.0)):  # they start anew from each checkpoint
        found = fit.attributor().score(method, fit.queries)
        assert found.figures["drift"] > 0.1
        (note,) = (note for note in found.notes if "miss the weights of the fit" in note)
        worst = re.escape(f"up to {found.figures['drift']:.1e}")
        assert re.search(rf"{worst} \(step [36]\) of the distance", note)
        assert "in worker processes" in note


def test_data_without_the_augmentation_is_not_what_was_trained_on(tmp_path):
    fit = fitted(tmp_path, noisy=True)
    with pytest.raises(DriftError, match=r"those given here are not: pass the dataset that was trained on"):
        replayed(fit, train=fit.data.plain)


def test_the_attention_kernel_is_named_and_its_difference_measured(tmp_path):
    fit = fitted(tmp_path, net="transformer", dtype=torch.float32, groups=({"momentum": 0.9},))
    for method in (plain(), TracIn()):
        found = fit.attributor().score(method, fit.queries)
        assert 0.0 < found.figures["attention_drift"] < 1e-5
        assert found.figures["attention_drift"] / 100 < found.figures["drift"] < 1e-4
        gap = f"gradients of one step differ by {found.figures['attention_drift']:.1e} of their length"
        (note,) = (note for note in found.notes if "Attention" in note)
        assert gap in note
        assert not any("miss the weights of the fit" in note for note in found.notes)
    with pytest.raises(DriftError, match=KERNEL):
        fit.attributor().score(plain(max_drift=1e-12), fit.queries)


def test_a_rough_fit_makes_much_of_the_attention_kernel(tmp_path):
    """One checkpoint at the end of steps that are far too long: rounding grows from step to step."""
    rough = {"lr": 5.0, "groups": ({"momentum": 0.9},), "epochs": 10, "every_n_epochs": 100}
    fit = fitted(tmp_path, net="transformer", dtype=torch.float32, **rough)
    found = fit.attributor().score(TracIn(max_drift=1e9), fit.queries)
    assert found.figures["attention_drift"] < 1e-5
    assert found.figures["drift"] > 2e-3
    (note,) = (note for note in found.notes if "miss the weights of the fit" in note)
    assert re.search(KERNEL, note)


def test_where_no_fused_kernel_ran_nothing_is_said_of_it(tmp_path):
    fit = fitted(tmp_path)
    found = fit.attributor().score(plain(), fit.queries)
    assert "attention_drift" not in found.figures
    assert not any("ttention" in note for note in found.notes)
