"""Training is what it would be without the guest, and everything is put back afterwards."""

import pickle
import random

import pytest
import torch
from fits import Indexed, Net, fit, loader, recorded, seeded

from lightning_influence.callback.influence import Influence
from lightning_influence.capture.identity import _taps
from lightning_influence.trajectory import Trajectory

CASES = {
    "sgd": ({}, {}, {}),
    "momentum": ({"momentum": 0.9, "schedule": "step"}, {}, {}),
    "adamw": ({"optimizer": "adamw", "lr": 0.01}, {}, {}),
    "lbfgs": ({"optimizer": "lbfgs"}, {}, {}),
    "dropout": ({"dropout": 0.5}, {}, {}),
    "batchnorm": ({"batchnorm": True}, {"drop_last": True}, {}),
    "augmentation": ({}, {"data": Indexed(noise=1.0)}, {}),
    "augmentation_2_workers": ({}, {"data": Indexed(noise=1.0), "num_workers": 2}, {}),
    "accumulation": ({"momentum": 0.9}, {}, {"accumulate_grad_batches": 4}),
    "clip_norm": ({}, {}, {"gradient_clip_val": 0.1}),
    "clip_value": ({}, {}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "bf16": ({}, {}, {"precision": "bf16-mixed"}),
    "validation": ({}, {}, {"val_check_interval": 2}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`", "ignore:.*val_dataloader.*")
def test_training_is_bit_identical(name, tmp_path):
    module, data, options = CASES[name]
    runs = []
    for callbacks in ([], [Influence(dirpath=tmp_path)]):
        random.seed(3)
        net = seeded(Net, **module)
        fit(net, loader(**data), *callbacks, **options)
        runs.append((net.state_dict(), net.seen, torch.get_rng_state().tolist(), random.getstate()))
    (plain, *others), (watched, *same) = runs
    assert others == same
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


class Boom(RuntimeError):
    pass


class Breaks(Net):
    error: type = Boom

    def training_step(self, batch, batch_idx):
        if self.global_step == 8:
            raise self.error()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("error", "seen"), [(Boom, Boom), (KeyboardInterrupt, SystemExit)])
def test_an_error_leaves_a_readable_run_and_nothing_else(error, seen, tmp_path):
    influence, module, made = Influence(dirpath=tmp_path), seeded(Breaks), loader()
    module.error = error
    with pytest.raises(seen):
        fit(module, made, influence)
    trajectory = Trajectory.load(tmp_path)
    assert recorded(trajectory) == module.seen
    assert [c.step for c in trajectory.checkpoints] == [0, 6]
    assert not trajectory.finished
    assert any("Not counted: 2 steps after the last checkpoint" in note for note in trajectory.notes)
    assert type(made).__name__ == "DataLoader"
    assert type(made) is torch.utils.data.DataLoader
    assert not _taps
    assert "process_dataloader" not in vars(module.trainer.strategy)
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_a_second_fit_is_a_second_run(tmp_path):
    influence = Influence(dirpath=tmp_path)
    for expected in ("run-0", "run-1"):
        fit(seeded(Net), loader(), influence)
        assert influence.run_dir.name == expected
        assert len(influence.trajectory.steps) == 12
    assert Trajectory.load(tmp_path).path.name == "run-1"
    assert Trajectory.load(tmp_path / "run-0").finished


def test_pickling_the_callback_does_not_pickle_the_model(tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Net)
    module.ballast = torch.nn.Linear(300, 300)
    fit(module, loader(), influence)
    copy = pickle.loads(pickle.dumps(influence))
    assert len(pickle.dumps(influence)) < 5_000
    assert len(copy.trajectory.steps) == 12


def test_a_users_checkpoint_stays_loadable_and_small(tmp_path):
    influence = Influence(dirpath=tmp_path / "influence")
    trainer = fit(seeded(Net), loader(), influence, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["global_step"] == 6


def test_fast_dev_run_does_nothing(tmp_path):
    influence = Influence(dirpath=tmp_path / "nowhere")
    fit(seeded(Net), loader(), influence, fast_dev_run=True)
    assert not (tmp_path / "nowhere").exists()
    assert influence.run_dir is None


def test_learning_rate_finder_is_not_recorded(tmp_path):
    from pytorch_lightning.callbacks import LearningRateFinder

    influence, module = Influence(dirpath=tmp_path / "influence"), seeded(Net)
    finder = LearningRateFinder(num_training_steps=20)
    fit(module, loader(), influence, finder, default_root_dir=tmp_path)
    trajectory = influence.trajectory
    assert recorded(trajectory) == module.seen[-12:]
    assert [c.step for c in trajectory.checkpoints] == [0, 6, 12]


def test_batch_size_finder_is_not_recorded(tmp_path):
    from pytorch_lightning.callbacks import BatchSizeFinder

    class Sized(Net):
        batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    influence, module = Influence(dirpath=tmp_path / "influence"), seeded(Sized)
    fit(module, None, influence, BatchSizeFinder(max_trials=2), default_root_dir=tmp_path)
    trajectory = influence.trajectory
    micro = recorded(trajectory)
    assert micro == module.seen[-len(micro) :]
    assert sorted(i for ids in micro for i in ids) == sorted([*range(23)] * 2)
