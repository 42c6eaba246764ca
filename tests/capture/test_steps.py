"""What each optimizer step is said to have done is what it did."""

import itertools

import pyarrow.compute as pc
import pytest
import torch
from fits import Indexed, Net, fit, loader, recorded, seeded
from pytorch_lightning import Callback

from lightning_influence.callback.influence import Influence
from lightning_influence.trajectory import Trajectory


def column(influence, name):
    return influence.trajectory.steps[name].to_pylist()


class Applied(Callback):
    """The learning rate inside `Optimizer.step`, as the optimizer itself reads it."""

    def __init__(self):
        self.rates = []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            step = type(optimizer).step

            def spy(*args, _optimizer=optimizer, _step=step, **kwargs):
                result = _step(_optimizer, *args, **kwargs)
                self.rates.append([g["lr"] for g in _optimizer.param_groups])
                return result

            optimizer.step = spy


class WarmUp(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_the_learning_rate_is_the_one_applied(schedule, tmp_path):
    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net, schedule=schedule), loader(), influence)
    halvings = range(12) if schedule == "step" else [0] * 6 + [1] * 6
    assert column(influence, "lr") == [[0.1 * 0.5**k] for k in halvings]


def test_the_learning_rate_of_a_warm_up_is_the_one_applied(tmp_path):
    influence = Influence(dirpath=tmp_path)
    fit(seeded(WarmUp), loader(), influence)
    assert column(influence, "lr") == [[0.01 * (k + 1)] for k in range(12)]


@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_keeps_its_divisor_in_short_windows(k, tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Net)
    fit(module, loader(), influence, accumulate_grad_batches=k)
    assert column(influence, "divisor") == [k] * len(influence.trajectory.steps)
    windows = [len(row) for row in column(influence, "ids")]
    assert windows == ([2, 2, 2] if k == 2 else [4, 2]) * 2
    assert recorded(influence.trajectory) == module.seen


def test_the_clip_coefficient_is_what_gradients_were_multiplied_by(tmp_path):
    ratios = []

    class Look(Net):
        def on_before_optimizer_step(self, optimizer):
            self.before = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            ratios.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm() / self.before))

    influence = Influence(dirpath=tmp_path)
    fit(seeded(Look), loader(), influence, gradient_clip_val=0.5)
    assert min(ratios) < 0.9
    assert column(influence, "clip") == pytest.approx(ratios, rel=1e-5)


def test_no_clip_coefficient_where_there_is_none(tmp_path):
    for options in ({}, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}):
        influence = Influence(dirpath=tmp_path)
        fit(seeded(Net), loader(), influence, **options)
        assert set(column(influence, "clip")) == {None}
    assert any("clip" in note for note in influence.trajectory.notes)


def test_random_state_is_kept_where_the_forward_drew(tmp_path):
    drawing, still = Influence(dirpath=tmp_path / "a"), Influence(dirpath=tmp_path / "b")
    states = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            states.append(torch.get_rng_state().numpy().tobytes())
            return super().training_step(batch, batch_idx)

    fit(seeded(Look, dropout=0.5), loader(), drawing, accumulate_grad_batches=2)
    found = [micro["torch"] for row in column(drawing, "rng") for micro in row]
    assert found == states[: len(found)]  # when the fit has ended, a few losses are computed
    assert {micro["python"] for row in column(drawing, "rng") for micro in row} == {None}
    fit(seeded(Net), loader(), still)
    assert set(column(still, "rng")) == {None}
    assert set(column(still, "read_rng")) == {None}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_state_is_kept_where_reading_drew(workers, tmp_path):
    influence, states = Influence(dirpath=tmp_path), []

    class Look(Indexed):
        def __getitem__(self, i):
            states.append((i, torch.get_rng_state().numpy().tobytes()))
            return super().__getitem__(i)

    module = seeded(Net)
    fit(module, loader(Look(noise=1.0), num_workers=workers), influence, accumulate_grad_batches=2)
    found = column(influence, "read_rng")
    if workers:  # of theirs nothing is known
        assert set(found) == {None}
        return
    firsts = [states[k] for k in itertools.accumulate(map(len, module.seen[:-1]), initial=0)]
    assert firsts == [
        (ids[0], micro["torch"])
        for ids, micro in zip(module.seen, (micro for row in found for micro in row), strict=True)
    ]
    assert {micro[name] for row in found for micro in row for name in ("python", "numpy")} == {None}


def test_settings_are_kept_and_follow_changes(tmp_path):
    class Change(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[0]["momentum"] = 0.5

    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net, momentum=0.9, weight_decay=0.1), loader(), influence, Change())
    trajectory = influence.trajectory
    assert [entry["groups"][0]["momentum"] for entry in trajectory.settings] == [0.9, 0.5]
    assert trajectory.settings[0]["groups"][0]["weight_decay"] == 0.1
    assert column(influence, "settings") == [0] * 6 + [1] * 6
    assert not trajectory.adaptive
    assert dict(trajectory.parameter_groups) == {"layer.weight": 0, "layer.bias": 0}


def test_groups_that_a_callback_adds_are_followed(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": [pl_module.layer.bias], "lr": 0.01})

    class Frozen(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([self.layer.weight], lr=0.1)

    influence = Influence(dirpath=tmp_path)
    fit(seeded(Frozen), loader(), influence, Unfreeze())
    trajectory = influence.trajectory
    assert dict(trajectory.parameter_groups) == {"layer.weight": 0, "layer.bias": 1}
    assert column(influence, "lr") == [[0.1]] * 6 + [[0.1, 0.01]] * 6
    assert trajectory.exposure(1, "mean", 23)[1].sum() == 0
    assert trajectory.learning_rates(2) == [0.1, 0.01]


def test_an_optimizer_that_a_callback_replaces_is_followed(tmp_path):
    class Replace(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [torch.optim.Adam(pl_module.parameters(), lr=0.5)]

    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net), loader(), Replace(), influence)
    assert [entry["kind"] for entry in influence.trajectory.settings] == ["SGD", "Adam"]
    assert column(influence, "lr") == [[0.1]] * 6 + [[0.5]] * 6
    assert influence.trajectory.adaptive


class Manual(Net):
    """Two optimizers; the second steps every other batch, over what it accumulated or over the last batch only."""

    def __init__(self, raw=False, throw_away=False):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)
        self.raw, self.throw_away = raw, throw_away

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["idx"].tolist())
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if self.throw_away and batch_idx % 2:
            second.zero_grad()
        self.manual_backward((self.other(batch["x"]) - batch["y"]).pow(2).mean())
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        sgd = torch.optim.SGD
        return sgd(self.layer.parameters(), lr=0.1), sgd(self.other.parameters(), lr=0.2)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("throw_away", [False, True])
def test_several_optimizers_are_recorded_apart(raw, throw_away, tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Manual, raw, throw_away)
    fit(module, loader(), influence, max_epochs=1)
    rows = influence.trajectory.steps.to_pylist()
    first, second = ([row for row in rows if row["optimizer"] == k] for k in (0, 1))
    assert [row["ids"] for row in first] == [[ids] for ids in module.seen]
    pairs = [module.seen[k : k + 2] for k in (0, 2, 4)]
    assert [row["ids"] for row in second] == ([pair[1:] for pair in pairs] if throw_away else pairs)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert influence.trajectory.n_groups == 2
    assert influence.trajectory.parameter_groups["other.bias"] == 1
    assert influence.trajectory.learning_rates(1) == [0.1, 0.2]


def test_lbfgs_is_one_step_a_batch(tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Net, optimizer="lbfgs")
    fit(module, loader(), influence, max_epochs=1)
    batches = [ids for k, ids in enumerate(module.seen) if k == 0 or ids != module.seen[k - 1]]
    assert column(influence, "ids") == [[ids] for ids in batches]
    assert influence.trajectory.adaptive


class Overflows(Net):
    """An infinite loss in every third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_count_nothing(fused, tmp_path):
    from pytorch_lightning.plugins.precision import MixedPrecision

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    influence = Influence(dirpath=tmp_path)
    module = seeded(Overflows, fused=fused)
    fit(module, loader(), influence, max_epochs=1, plugins=[precision])
    assert column(influence, "skipped") == [False, True, False, False, True, False]
    assert column(influence, "step") == [1, 1, 2, 3, 3, 4]
    assert recorded(influence.trajectory) == module.seen
    trajectory = influence.trajectory
    exposure = trajectory.exposure(1, "mean", 23)
    assert exposure.sum() == pytest.approx(0.4)
    assert exposure[0, module.seen[1]].abs().sum() == 0


@pytest.mark.parametrize("words", [{"every_n_epochs": 2}, {"every_n_train_steps": 5}, {"every_n_epochs": 0}])
def test_the_schedule_has_initial_and_final(words, tmp_path):
    influence = Influence(dirpath=tmp_path, **words)
    fit(seeded(Net), loader(), influence, max_epochs=3)
    expected = {"every_n_epochs": [0, 12, 18] if words.get("every_n_epochs") else [0, 18]}
    expected["every_n_train_steps"] = [0, 5, 10, 15, 18]
    assert [c.step for c in influence.trajectory.checkpoints] == expected[next(iter(words))]


def test_checkpoints_are_the_weights_between_steps(tmp_path):
    weights = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            weights.append(self.layer.weight.detach().clone())
            return super().training_step(batch, batch_idx)

    influence, module = Influence(dirpath=tmp_path, every_n_train_steps=1), seeded(Look, momentum=0.9, batchnorm=True)
    fit(module, loader(), influence, max_epochs=1)
    states = [c.load() for c in influence.trajectory.checkpoints]
    trained = weights[: len(states) - 1]  # when the fit has ended, a few losses are computed
    for state, weight in zip(states, [*trained, module.layer.weight], strict=True):
        assert torch.equal(state.parameters["layer.weight"], weight)
    assert set(states[-1].buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(states[-1].optimizer["layer.weight"]) == {"momentum_buffer"}
    assert {"torch", "python"} <= set(states[-1].random)
    path = influence.trajectory.checkpoints[-1].path
    assert set(torch.load(path, weights_only=True)) == {"parameters", "buffers", "optimizer", "random"}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("words", [{}, {"every_n_train_steps": 100}, {"every_n_epochs": 0}])
def test_the_final_checkpoint_is_raw_whatever_averages(words, first, tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    last = []

    class Look(Net):
        def on_train_epoch_end(self):
            last.append(self.layer.weight.detach().clone())

    influence, average, module = Influence(dirpath=tmp_path, **words), EMAWeightAveraging(decay=0.5), seeded(Look)
    fit(module, loader(), *((influence, average) if first else (average, influence)))
    final = influence.trajectory.checkpoints[-1].load().parameters["layer.weight"]
    assert torch.equal(final, last[-1])
    assert not torch.equal(final, module.layer.weight)


def test_the_extra_epoch_of_swa_is_no_step(tmp_path):
    from pytorch_lightning.callbacks import StochasticWeightAveraging

    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net, batchnorm=True), loader(), averaging, influence, max_epochs=3)
    trajectory = influence.trajectory
    assert len(trajectory.steps) == 18
    assert [c.step for c in trajectory.checkpoints] == [0, 6, 12, 18]


def test_draws_of_every_generator_are_noticed():
    import random

    import numpy as np

    from lightning_influence.capture.randomness import gather_random, moved_since, read_generators

    device = torch.device("cpu")
    for name, draw in {"torch": lambda: torch.rand(1), "python": random.random, "numpy": np.random.rand}.items():
        before, keys, numbers = read_generators(device), np.random.get_state(), random.getstate()[1]
        assert moved_since(before, device) is None
        draw()
        moved = moved_since(before, device)
        assert set(moved) == {name}
        if name == "numpy":
            assert np.frombuffer(moved[name], np.uint32).tolist() == [*keys[1].tolist(), keys[2]]
        if name == "python":  # the position comes first
            assert np.frombuffer(moved[name], np.uint32).tolist() == [numbers[624], *numbers[:624]]
    assert gather_random(device)["python"][1:626].tolist() == list(random.getstate()[1])
    assert gather_random(device)["numpy"][:624].tolist() == np.random.get_state()[1].tolist()


class Silent(Net):
    """Has no loss in its second batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("k", [1, 3])
def test_a_batch_without_a_loss_moved_nothing(k, tmp_path):
    module = seeded(Silent)
    options = {"max_epochs": 1, "accumulate_grad_batches": k}
    fit(module, loader(torch.utils.data.Subset(Indexed(), range(12))), Influence(dirpath=tmp_path), **options)
    steps = Trajectory.load(tmp_path).steps
    first, _, third = module.seen
    expected = [[first], [third]] if k == 1 else [[first, third]]
    assert steps.filter(pc.invert(steps["skipped"]))["ids"].to_pylist() == expected
    assert Trajectory.load(tmp_path).exposure(-1, "mean", 23).count_nonzero() == 8


class Discards(Net):
    """Manual: throws its first batch away by zeros in place of gradients, and steps after two more."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx == 0:
            self.optimizers().zero_grad(set_to_none=False)
        if batch_idx == 2:
            self.optimizers().step()


def test_gradients_thrown_away_as_zeros_are_of_no_step(tmp_path):
    module = seeded(Discards)
    fit(module, loader(torch.utils.data.Subset(Indexed(), range(12))), Influence(dirpath=tmp_path), max_epochs=1)
    assert recorded(Trajectory.load(tmp_path)) == module.seen[1:]
