"""A captured fit run again, under the weights it had and others, against the same steps written out by hand."""

import pytest
import torch
from oracles_dynamic import unrolled

from lightning_influence.replay.replay import DriftError, Replay
from lightning_influence.replay.vectorized import run_many
from replay.runs import N, fitted, joint

CASES = {
    "sgd": {},
    "momentum, two groups": {
        "groups": ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True, "lr": 0.03})
    },
    "accumulation, clipping by norm": {"divisor": 2, "clip": ("norm", 0.3)},
    "clipping by value, sum": {"clip": ("value", 0.05), "summed": True, "lr": 0.01},
    "adamw": {"kind": "AdamW", "groups": ({"weight_decay": 0.1},), "lr": 0.01},
    "cnn": {"net": "cnn", "kind": "Adam", "lr": 0.01},
    "transformer": {"net": "transformer"},
    "dropout": {"net": "dropout", "divisor": 2},
    "batchnorm": {"net": "batchnorm", "divisor": 2},
    "augmentation": {"noisy": True, "divisor": 2, "groups": ({"momentum": 0.9},)},
}
FAST = ("momentum, two groups", "dropout", "augmentation")


def marked(cases):
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in cases]


def close(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[f"net.{name}"], value.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", marked(CASES))
def test_runs_under_any_weights_are_those_written_out(case, tmp_path):
    options = CASES[case]
    fit = fitted(tmp_path, **options)
    weights = torch.rand(3, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[0, [2, 5]] = 0.0
    final = {name: p.detach().clone() for name, p in fit.module.net.named_parameters()}
    buffers = {name: b.clone() for name, b in fit.module.named_buffers()}
    losses = (joint,) if options.get("net") == "batchnorm" else (None, joint)
    for loss in losses:
        with fit.attributor(loss)._session.open() as session:
            replay = Replay(session.engine, session.examples, fit.influence.trajectory)
            end = replay.run()
            assert replay.drift <= 1e-12
            close(end.weights, final)
            for name, buffer in buffers.items():
                torch.testing.assert_close(end.buffers[name], buffer)
            many = run_many(replay, weights)
            for k, w in enumerate(weights):
                expected = unrolled(fit.run, w)
                close(replay.run(w).weights, expected)
                close({name: value[k] for name, value in many.items()}, expected)
            if not options.get("summed"):
                close(replay.run(weights[0], renormalize=True).weights, unrolled(fit.renormalized(), weights[0]))
                many = run_many(replay, weights, renormalize=True)
                close({name: value[1] for name, value in many.items()}, unrolled(fit.renormalized(), weights[1]))


def test_walking_backwards_in_stretches_of_any_length_is_walking_at_once(tmp_path, monkeypatch):
    fit = fitted(tmp_path, groups=({"momentum": 0.9},))
    with fit.attributor()._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory)
        with replay.training():
            whole = list(replay.backwards())
            for states in (1, 2):
                monkeypatch.setattr("lightning_influence.replay.replay._HELD", states * whole[0].before.bytes())
                pieces = list(replay.backwards())
                assert [m.step for m in pieces] == [m.step for m in whole]
                for one, other in zip(pieces, whole, strict=True):
                    for name, value in other.gradients.items():
                        assert torch.equal(one.gradients[name], value)
                        assert torch.equal(one.before.weights[name], other.before.weights[name])


def test_a_fit_that_something_else_moved_is_refused(tmp_path):
    fit = fitted(tmp_path)
    x = fit.data.tensors[0]
    x.add_(1.0)  # other data than what was trained on
    with fit.attributor(check_data=False)._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory)
        with pytest.raises(DriftError, match=r"end at the fit's weights of step 3, within 0\.1 .*Likely causes"):
            replay.run()
    with fit.attributor(check_data=False)._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory, max_drift=100.0)
        replay.run()
        assert replay.drift > 0.1
        assert replay.beyond_rounding()


def test_batch_statistics_need_losses_of_the_joint_batch(tmp_path):
    fit = fitted(tmp_path, net="batchnorm")
    with fit.attributor()._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory)
        replay.run()  # whole batches are as they were
        with pytest.raises(ValueError, match=r"got `net\.1` \(BatchNorm1d\) in train mode.*Pass `loss=`"):
            Replay(session.engine, session.examples, fit.influence.trajectory).run(torch.ones(N))


def test_losses_that_were_not_trained_on_are_refused(tmp_path):
    fit = fitted(tmp_path)
    with fit.attributor(lambda module, batch: 2 * joint(module, batch))._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory)
        with pytest.raises(ValueError, match=r"the sum of `loss=` to be what `training_step` returns"):
            replay.run()


def test_weights_of_another_shape(tmp_path):
    fit = fitted(tmp_path)
    with fit.attributor()._session.open() as session:
        replay = Replay(session.engine, session.examples, fit.influence.trajectory)
        with pytest.raises(ValueError, match=rf"\[model, train\] with {N} training examples, got \[2, 3\]"):
            run_many(replay, torch.ones(2, 3))
