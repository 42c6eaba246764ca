"""What is read back is what was written, and its numbers are those of a plain loop over the fit."""

import json
import subprocess
import sys
import warnings

import pytest
import pytorch_lightning as pl
import torch
from fits import Net, fit, loader, recorded, seeded

from lightning_influence.callback.influence import Influence
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence


class Diary(Net):
    """A brute-force account of the fit, with nothing from the package in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps, self.window, self.ends = [], [], []

    def training_step(self, batch, batch_idx):
        self.window.append(batch["idx"].tolist())
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        norm = torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item()
        limit = self.trainer.gradient_clip_val
        clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        rates = [group["lr"] for group in optimizer.param_groups]
        self.steps.append((rates, self.window, clip))
        self.window = []

    def on_train_epoch_end(self):
        self.ends.append(len(self.steps))

    def exposure(self, epoch, reduction, divisor, momentum=0.0):
        begin = self.ends[epoch - 1] if epoch else 0
        exposure = torch.zeros(len(self.steps[0][0]), 23, dtype=torch.float64)
        for rates, window, clip in self.steps[begin : self.ends[epoch]]:
            for ids in window:
                for i in ids:
                    weight = (1 / len(ids) if reduction == "mean" else 1) / divisor
                    for group, rate in enumerate(rates):
                        exposure[group, i] += rate * weight * clip / (1 - momentum)
        return exposure


class Grouped(Diary):
    def configure_optimizers(self):
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("make", "options", "k"),
    [
        (Diary, {}, 1),
        (lambda: Diary(schedule="step"), {}, 1),
        (Diary, {"accumulate_grad_batches": 4}, 4),
        (Diary, {"gradient_clip_val": 0.5}, 1),
        (Grouped, {"accumulate_grad_batches": 2}, 2),
    ],
    ids=["plain", "schedule", "accumulation", "clipping", "groups"],
)
def test_exposure_is_that_of_a_plain_loop(make, options, k, reduction, tmp_path):
    module = seeded(make)
    replace = torch.utils.data.RandomSampler(range(23), replacement=True, num_samples=30)
    fit(module, loader(shuffle=None, sampler=replace), Influence(dirpath=tmp_path), **options)
    trajectory = Trajectory.load(tmp_path)
    momentum = 0.9 if make is Grouped else 0.0
    for epoch in (0, 1):
        expected = module.exposure(epoch, reduction, k, momentum)
        torch.testing.assert_close(trajectory.exposure(epoch + 1, reduction, 23), expected, rtol=1e-6, atol=1e-12)
    assert not trajectory.exposure(0, reduction, 23).any()


def test_momentum_and_dampening_scale_exposure(tmp_path):
    module = seeded(Diary, momentum=0.5, dampening=0.5)
    fit(module, loader(), Influence(dirpath=tmp_path), max_epochs=1)
    expected = module.exposure(0, "mean", 1)  # (1 - dampening) / (1 - momentum) is 1
    torch.testing.assert_close(Trajectory.load(tmp_path).exposure(1, "mean", 23), expected)


def test_learning_rates_are_those_applied_last(tmp_path):
    fit(seeded(Net, schedule="epoch"), loader(), Influence(dirpath=tmp_path), max_epochs=3)
    trajectory = Trajectory.load(tmp_path)
    assert [trajectory.learning_rates(k) for k in range(4)] == [[0.1], [0.1], [0.05], [0.025]]
    assert trajectory.learning_rates(-1) == [0.025]


def test_the_only_checkpoint_stands_for_all_steps(tmp_path):
    class Stops(Diary):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.ends.append(4)
                raise RuntimeError("stop")

    module = seeded(Stops)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, loader(), Influence(dirpath=tmp_path))
    trajectory = Trajectory.load(tmp_path)
    assert len(trajectory.checkpoints) == 1
    torch.testing.assert_close(trajectory.exposure(0, "mean", 23), module.exposure(0, "mean", 1))


def test_no_steps_at_all_weigh_all_examples_alike(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(seeded(Fails), loader(), Influence(dirpath=tmp_path))
    exposure = Trajectory.load(tmp_path).exposure(0, "mean", 10)
    assert exposure.flatten().tolist() == [0.1] * 10 or exposure.numel() == 0


class Fails(Net):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError


def test_a_shorter_dataset_is_refused(tmp_path):
    fit(seeded(Net), loader(), Influence(dirpath=tmp_path), max_epochs=1)
    with pytest.raises(ValueError, match="dataset of length 20, got index 22"):
        Trajectory.load(tmp_path).exposure(1, "mean", 20)
    with pytest.raises(ValueError, match="Expected `reduction` to be 'mean' or 'sum', got 'none'"):
        Trajectory.load(tmp_path).exposure(1, "none", 23)


@pytest.mark.filterwarnings("ignore:.*does not know which examples.*")
def test_without_batch_order_exposure_is_its_expectation(tmp_path):
    from fits import Stream

    stream = torch.utils.data.DataLoader(Stream(), 4)
    fit(seeded(Net), stream, Influence(dirpath=tmp_path), accumulate_grad_batches=2)
    trajectory = Trajectory.load(tmp_path)
    assert not trajectory.has_batch_order
    assert trajectory.exposure(1, "mean", 23).tolist() == [pytest.approx([0.1 * 3 / 23] * 23)]
    assert trajectory.exposure(1, "sum", 23).tolist() == [pytest.approx([0.1 / 2] * 23)]


def test_another_process_reads_it(tmp_path):
    module = seeded(Net)
    fit(module, loader(), Influence(dirpath=tmp_path))
    program = (
        "import json, sys; from lightning_influence.trajectory import Trajectory; t = Trajectory.load(sys.argv[1]);"
        "print(json.dumps([t.steps['ids'].to_pylist(), t.checkpoints[-1].load().parameters['layer.bias'].tolist()]))"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    ids, bias = json.loads(answer.stdout)
    assert [micro for row in ids for micro in row] == module.seen
    assert bias == module.layer.bias.tolist()


@pytest.fixture
def run(tmp_path):
    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net), loader(), influence)
    return influence.run_dir


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "text"), [(flip, "checksum"), (truncate, "damaged"), (lambda p: p.unlink(), "No such file")]
)
def test_a_damaged_checkpoint_is_named(run, damage, text):
    checkpoint = Trajectory.load(run).checkpoints[1]
    damage(checkpoint.path)
    with pytest.raises(MissingEvidence, match=text) as caught:
        Trajectory.load(run).checkpoints[1].load()
    assert "step-00000006.pt" in str(caught.value)
    Trajectory.load(run).checkpoints[2].load()


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_steps_and_manifests_are_named(run, damage):
    damage(run / "steps" / "00000000.arrow")
    with pytest.raises(MissingEvidence, match=r"00000000\.arrow"):
        Trajectory.load(run)
    damage(run / "manifest.json")
    with pytest.raises(MissingEvidence, match=r"whole manifest .*manifest\.json"):
        Trajectory.load(run)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(MissingEvidence, match="Expected a run of `Influence`"):
        Trajectory.load(tmp_path)
    with pytest.raises(MissingEvidence, match="Expected a run of `Influence`"):
        Trajectory.load(tmp_path / "absent")


def test_a_run_that_never_began_is_passed_over(run):
    (run.parent / "run-7").mkdir()
    trajectory = Trajectory.load(run.parent)
    assert trajectory.path == run
    assert any("run-7" in note for note in trajectory.notes)


def test_a_newer_format_is_refused(run):
    from lightning_influence.files import checked_json
    from lightning_influence.trajectory.files import read_manifest

    (run / "manifest.json").write_bytes(checked_json.encode(read_manifest(run) | {"format": 99}))
    with pytest.raises(MissingEvidence, match=r"format 1 or older.*got 99"):
        Trajectory.load(run)


# ---- a user's existing checkpoints ----


@pytest.fixture
def files(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1)
    module = seeded(Net, schedule="epoch", momentum=0.5)
    fit(module, loader(), keep, max_epochs=3, enable_checkpointing=True)
    return sorted((tmp_path / "ckpt").glob("*.ckpt"), reverse=True), module


def test_existing_checkpoints_are_read_in_order_with_a_warning(files):
    paths, module = files
    with pytest.warns(UserWarning, match="learning rates stored .* step after"):
        trajectory = Trajectory.from_checkpoints(paths)
    assert [(c.step, c.epoch) for c in trajectory.checkpoints] == [(6, 0), (12, 1), (18, 2)]
    assert [trajectory.learning_rates(k) for k in range(3)] == [[0.05], [0.025], [0.0125]]
    assert torch.equal(trajectory.checkpoints[-1].load().parameters["layer.weight"], module.layer.weight)
    assert not trajectory.has_batch_order
    assert len(trajectory.steps) == 0
    assert trajectory.n_groups == 1
    assert trajectory.parameter_groups["layer.weight"] == 0
    assert not trajectory.adaptive


def test_given_learning_rates_are_used(files):
    trajectory = Trajectory.from_checkpoints(files[0], learning_rates=[0.025, 0.05, 0.1])  # in the order of the paths
    assert [trajectory.learning_rates(k) for k in range(3)] == [[0.1], [0.05], [0.025]]
    expected = 0.05 * 6 / 23 / (1 - 0.5)
    assert trajectory.exposure(1, "mean", 23).tolist() == [pytest.approx([expected] * 23)]
    by_sum = 0.05 / (1 - 0.5)
    assert trajectory.exposure(1, "sum", 23, batches_per_epoch=6).tolist() == [pytest.approx([by_sum] * 23)]
    with pytest.raises(ValueError, match="Expected the number of batches per epoch"):
        trajectory.exposure(1, "sum", 23)
    assert Trajectory.from_checkpoints(files[0], learning_rates=0.3).learning_rates(2) == [0.3]


def test_learning_rates_of_another_length_are_refused(files):
    with pytest.raises(ValueError, match="each of 3 checkpoints, got 2"):
        Trajectory.from_checkpoints(files[0], learning_rates=[0.1, 0.1])
    with pytest.raises(ValueError, match="at least one path"):
        Trajectory.from_checkpoints([])


def test_files_that_are_no_checkpoints_are_refused(tmp_path, files):
    with pytest.raises(MissingEvidence, match=r"absent\.ckpt"):
        Trajectory.from_checkpoints([tmp_path / "absent.ckpt"])
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(MissingEvidence, match=r"Expected `state_dict`.*other\.ckpt"):
        Trajectory.from_checkpoints([tmp_path / "other.ckpt"])
    truncate(files[0][0])
    with pytest.raises(MissingEvidence, match="Expected a whole checkpoint"):
        Trajectory.from_checkpoints(files[0], 0.1)
    torch.save({"state_dict": {}, "global_step": 1, "epoch": 0, "where": tmp_path}, tmp_path / "objects.ckpt")
    with pytest.raises(MissingEvidence, match="empty `state_dict`"):
        Trajectory.from_checkpoints([tmp_path / "objects.ckpt"], 0.1)


def test_weights_only_files_need_learning_rates(tmp_path):
    trainer = fit(seeded(Net), loader())
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    with pytest.raises(MissingEvidence, match="Pass `learning_rates=`"):
        Trajectory.from_checkpoints([tmp_path / "w.ckpt"])
    assert Trajectory.from_checkpoints([tmp_path / "w.ckpt"], 0.1).checkpoints[0].step == 12


def test_constant_learning_rates_need_no_warning(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1)
    fit(seeded(Net), loader(), keep, max_epochs=2, enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory = Trajectory.from_checkpoints(tmp_path / "ckpt")
    assert not any("step after" in note for note in trajectory.notes)


def test_groups_with_different_rates_need_to_be_told(tmp_path):
    class TwoRates(Net):
        def configure_optimizers(self):
            groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": 0.01}]
            return torch.optim.Adam(groups, lr=0.1)

    trainer = fit(seeded(TwoRates), loader())
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    with pytest.raises(MissingEvidence, match="which parameter was in which group"):
        Trajectory.from_checkpoints([tmp_path / "w.ckpt"])
    assert Trajectory.from_checkpoints([tmp_path / "w.ckpt"], 0.1).adaptive


def test_averaged_files_give_the_raw_weights(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    raw = []

    class Look(Net):
        def on_train_epoch_end(self):
            raw.append(self.layer.weight.detach().clone())

    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(seeded(Look), loader(), keep, EMAWeightAveraging(decay=0.5), max_epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="raw weights are read"):
        trajectory = Trajectory.from_checkpoints(list(tmp_path.glob("*.ckpt")), 0.1)
    assert torch.equal(trajectory.checkpoints[0].load().parameters["layer.weight"], raw[0])
    assert any("averaging callback" in note for note in trajectory.notes)
    assert recorded(trajectory) == []
