"""What a fit records about its data, and what a later question makes of it beside the named cases."""

import dataclasses
import json
import warnings

import pytest
import pytorch_lightning as pl
import torch
from fits import Indexed, Net, Stream, fit, loader, seeded
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_influence import EKFAC, Attributor, GradientDot, Influence, InfluenceFunction, TracInCP, Trajectory
from lightning_influence.data.examples import alike
from lightning_influence.setting import same_data
from lightning_influence.trajectory.fingerprints import difference, fingerprint, splits

QUERIES = Indexed(3)


def captured(tmp_path, loaders, *callbacks, make=Net, **options):
    influence = Influence(dirpath=tmp_path, **options.pop("influence", {}))
    fit(seeded(make), loaders, *callbacks, influence, **options)
    return Trajectory.load(tmp_path)


def scores(trajectory, train, make=Net, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Attributor(make(), train, trajectory, **options).score(GradientDot(), QUERIES)


def other(n=23):
    data = Indexed(n)
    data.x += 1.0
    return data


def scaled(items):
    batch = default_collate(items)
    return batch | {"x": 2 * batch["x"]}


# ---- what is recorded -----------------------------------------------------------------------------------------------


def test_a_few_batches_and_losses_are_recorded_and_confirmed(tmp_path):
    data = captured(tmp_path, loader(Indexed(60)), max_epochs=3).fit_data
    assert [len(batch.ids) for batch in data.batches] == [4, 4, 4, 4]  # the 1st, 2nd, 4th and 10th of 15
    assert [len(batch.few(2).entered[-1].rows) for batch in data.batches] == [2, 2, 2, 2]
    assert data.confirmed
    assert data.collate.endswith("default_collate")
    assert [step for step, _, _ in data.losses.values] == [0, 30, 45]
    assert data.losses.ids == data.batches[0].some


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_recorded_of_random_batches(workers, tmp_path):
    trajectory = captured(tmp_path, loader(Indexed(noise=1.0), num_workers=workers))
    assert trajectory.fit_data is None or not trajectory.fit_data.batches
    assert not scores(trajectory, Indexed()).notes[1:]  # the un-augmented data, as the contract has it


def test_batches_read_by_workers_are_confirmed_where_nothing_is_random(tmp_path):
    trajectory = captured(tmp_path, loader(num_workers=2))
    assert trajectory.fit_data.confirmed
    with pytest.raises(ValueError, match="Expected `train` to give the batches that were trained on"):
        scores(trajectory, other())


def test_no_loss_is_recorded_where_the_step_cannot_run_in_eval_mode(tmp_path):
    class TrainOnly(Net):
        def training_step(self, batch, batch_idx):
            assert self.training
            return super().training_step(batch, batch_idx)

    trajectory = captured(tmp_path, loader(), make=TrainOnly)
    assert trajectory.fit_data.losses is None
    assert len(trajectory.fit_data.batches) == 3


def test_batches_are_confirmed_in_manual_optimization(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    data = captured(tmp_path, loader(), make=Manual).fit_data
    assert data.confirmed
    assert data.batches
    assert data.losses is None


def test_a_step_that_writes_into_its_batch_is_compared(tmp_path):
    class Writes(Net):
        def training_step(self, batch, batch_idx):
            batch["x"].mul_(2.0)
            return self.loss({"x": batch.pop("x"), "y": batch["y"]})

    trajectory = captured(tmp_path, loader(), make=Writes)
    assert len(trajectory.fit_data.losses.values) == 3
    assert trajectory.fit_data.batches
    scores(trajectory, Indexed(), Writes)


def test_no_loss_is_recorded_where_it_is_another_each_time(tmp_path):
    calls = []

    class Counts(Net):
        def training_step(self, batch, batch_idx):
            calls.append(0)
            return super().training_step(batch, batch_idx) * len(calls)

    assert captured(tmp_path, loader(), make=Counts).fit_data.losses is None


def test_what_a_callback_does_to_batches_is_noted(tmp_path):
    class Scales(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch["x"].mul_(2.0)

    with pytest.warns(UserWarning, match="could not be made again"):
        trajectory = captured(tmp_path, loader(), Scales())
    assert not trajectory.fit_data.batches
    assert any(
        "could not be made again when it had ended: `batch['x']`" in n for n in scores(trajectory, Indexed()).notes
    )


def test_what_a_hook_does_in_train_mode_only_is_noted(tmp_path):
    class Scales(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch | {"x": 2 * batch["x"]} if self.training else batch

    with pytest.warns(UserWarning, match="could not be made again"):
        captured(tmp_path, loader(), make=Scales)


def test_the_fit_is_the_same_without_the_callback(tmp_path):
    class Counting(Dataset):
        """Shifts what it returns by the number of its calls."""

        def __init__(self):
            self.inner, self.calls = Indexed(), 0

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, i):
            self.calls += 1
            item = self.inner[i]
            return item | {"x": item["x"] + 0.01 * self.calls}

    def trained(*callbacks):
        module = seeded(Net, batchnorm=True, dropout=0.2, optimizer="adamw")
        fit(module, loader(Counting()), *callbacks)
        return module.state_dict(), torch.get_rng_state()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_it, without = trained(Influence(dirpath=tmp_path)), trained()
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)


def test_losses_are_compared_where_batches_are_random(tmp_path):
    class Weighted(Net):
        weight = 1.0

        def training_step(self, batch, batch_idx):
            return self.weight * super().training_step(batch, batch_idx)

    trajectory = captured(tmp_path, loader(Indexed(noise=1.0)), make=Weighted)
    scores(trajectory, Indexed(noise=1.0), Weighted)
    Weighted.weight = 2.0
    scores(trajectory, Indexed(), Weighted)  # other batches, of which nothing is known
    with pytest.raises(ValueError, match="Expected the module to give the losses of the fit"):
        scores(trajectory, Indexed(noise=1.0), Weighted)


# ---- later questions ------------------------------------------------------------------------------------------------


def test_a_run_without_fingerprints_is_not_checked(tmp_path):
    trajectory = captured(tmp_path, loader(collate_fn=scaled))
    assert scores(dataclasses.replace(trajectory, fit_data=None), Indexed()).values.shape == (3, 23)


@pytest.mark.parametrize("method", [TracInCP(), InfluenceFunction(EKFAC())])
def test_every_question_is_checked(method, tmp_path):
    attributor = Attributor(Net(), Indexed(), captured(tmp_path, loader(collate_fn=scaled)))
    for question in (
        lambda: attributor.score(method, QUERIES),
        lambda: attributor.self_influence(method),
        lambda: attributor.group(method, [1, 2], QUERIES),
        lambda: attributor.cost(method),
        attributor.losses,
    ):
        with pytest.raises(ValueError, match=r"collated with `.*test_fit_data\.scaled`"):
            question()


def test_few_rows_that_were_edited_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(same_data, "_SECONDS_FOR_OTHERS", 60.0)
    trajectory = captured(tmp_path, loader(Indexed(100), batch_size=10))
    data, known = Indexed(100), trajectory.fit_data.batches
    assert sum(len(batch.some) for batch in known) == 40
    data.y[known[2].ids[4]] += 1.0
    with pytest.raises(ValueError, match=r"`batch\['y'\]` has other values"):
        scores(trajectory, data)


def test_a_loss_of_the_users_is_not_compared_with_that_of_the_step(tmp_path):
    def loss(module, batch):
        return 3 * (module.layer(batch["x"]) - batch["y"]).pow(2).mean(1)

    assert scores(captured(tmp_path, loader()), Indexed(), loss=loss).values.shape == (3, 23)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_no_difference(precision, tmp_path):
    trajectory = captured(tmp_path, loader(), precision=precision)
    assert len(trajectory.fit_data.batches) == 3
    scores(trajectory, Indexed())
    with pytest.raises(ValueError, match="Expected `train` to give the batches"):
        scores(trajectory, other())


class Reading(IterableDataset):
    def __iter__(self):
        return iter(Indexed()[i] for i in range(23))


def test_streams_are_compared_by_their_own_ids_with_doubt(tmp_path):
    trajectory = captured(tmp_path, DataLoader(Stream(), 4), influence={"sample_id": "idx"})
    assert trajectory.fit_data.batches[1].ids == [4, 5, 6, 7]
    assert len(scores(trajectory, Indexed()).notes) == 1
    assert any(
        "differ from those that were trained on: `batch['x']`" in note for note in scores(trajectory, other()).notes
    )


def test_a_fit_that_was_interrupted_is_compared(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, *args):
            if args[-1] == 4:
                raise RuntimeError("stop")

    for name, options, refused in (("a", {}, True), ("b", {"num_workers": 2}, False)):
        with pytest.raises(RuntimeError, match="stop"):
            captured(tmp_path / name, loader(**options), Stops(), influence={"every_n_train_steps": 1})
        trajectory = Trajectory.load(tmp_path / name)
        assert not trajectory.fit_data.confirmed
        assert not any("differ from" in note for note in scores(trajectory, Indexed()).notes)
        if refused:
            with pytest.raises(ValueError, match="Expected `train` to give the batches"):
                scores(trajectory, other())
        else:
            assert any("differ from those that were trained on" in note for note in scores(trajectory, other()).notes)


def test_a_doubt_is_warned_of_once_per_question(tmp_path):
    trajectory = captured(tmp_path, DataLoader(Stream(), 4), influence={"sample_id": "idx"})
    with pytest.warns(UserWarning, match="differ from those that were trained on"):
        Attributor(Net(), other(), trajectory).score(GradientDot(), QUERIES)


def test_check_data_is_a_flag(tmp_path):
    with pytest.raises((TypeError, ValueError), match="`check_data`"):
        Attributor(Net(), Indexed(), check_data="no")


# ---- DataModules ----------------------------------------------------------------------------------------------------


class Validated(Net):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        assert self.trainer.world_size == 1
        self.calls.append(stage)

    def train_dataloader(self):
        return loader(collate_fn=scaled)

    def val_dataloader(self):
        return [DataLoader(Indexed(5), 2), DataLoader(Indexed(6), 2, collate_fn=scaled)]

    def test_dataloader(self):
        assert "test" in self.calls
        return DataLoader(Indexed(7), 2)


def test_a_datamodule_gives_training_data_and_queries(tmp_path):
    trajectory, data = captured(tmp_path, Data(), make=Validated), Data()
    attributor = Attributor(Net(), trajectory=trajectory, datamodule=data)
    assert [len(attributor.score(GradientDot(), q)) for q in ("val", "val:1", "test", "train")] == [5, 6, 7, 23]
    assert data.calls == ["prepare_data", "fit", "test"]
    expected = Attributor(Net(), loader(collate_fn=scaled), trajectory).score(GradientDot(), QUERIES)
    torch.testing.assert_close(attributor.score(GradientDot(), QUERIES).values, expected.values)
    for name, message in (("val:2", "one of 2 loaders"), ("predict", "or such as 'val:1', got 'predict'")):
        with pytest.raises(ValueError, match=message):
            attributor.score(GradientDot(), name)


def test_a_datamodule_that_was_fitted_is_not_set_up_again(tmp_path):
    data = Data()
    trajectory = captured(tmp_path, data, make=Validated)
    before = list(data.calls)
    attributor = Attributor(Net(), trajectory=trajectory, datamodule=data)
    attributor.score(GradientDot(), "val")
    assert data.calls == before


def test_what_is_no_datamodule_is_refused():
    with pytest.raises(TypeError, match="Expected `datamodule` to be a LightningDataModule"):
        Attributor(Net(), datamodule=Indexed())
    with pytest.raises(TypeError, match="Pass one of them, or `datamodule=`"):
        Attributor(Net())
    with pytest.raises(ValueError, match="to have a `train_dataloader`, got none"):
        Attributor(Net(), datamodule=pl.LightningDataModule())


# ---- fingerprints ---------------------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("x",)


def jagged(value):
    return torch.nested.nested_tensor([torch.full((n, 2), value) for n in (3, 1, 2, 4)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("batch", "change"),
    [
        ([torch.zeros(4, 3), torch.arange(4)], lambda b: b[1].__setitem__(2, 7)),
        ({"x": torch.ones(4, 2), "n": 3}, lambda b: b.update(n=4)),
        ({"x": torch.ones(4, 2), "text": ["a", "b", "c", "d"]}, lambda b: b["text"].reverse()),
        ([torch.arange(12.0).reshape(4, 3)], lambda b: b.__setitem__(0, b[0].flip(1))),
        ([torch.tensor([1.0, float("nan"), 2.0, 0.0])], lambda b: b[0].__setitem__(1, 0.0)),
        ([torch.eye(4).to_sparse()], lambda b: b.__setitem__(0, (2 * torch.eye(4)).to_sparse())),
        ([torch.ones(4, dtype=torch.complex64)], lambda b: b[0].mul_(1j)),
        ([torch.ones(4, 300, 300)], lambda b: b[0].mul_(1.01)),
        ([torch.ones(4), torch.ones(9)], lambda b: b[1].mul_(2)),
        ([torch.ones(4), [1.5, 2.5, 3.5, 4.5]], lambda b: b[1].__setitem__(0, 1.0)),
        ([torch.zeros(0, 4)], lambda b: b.append(1)),
        ([jagged(1.0)], lambda b: b.__setitem__(0, jagged(2.0))),
    ],
)
def test_a_change_of_a_batch_is_found(batch, change):
    before = fingerprint(batch, 4, [0, 2])
    json.dumps([dataclasses.asdict(leaf) for leaf in before])
    assert difference(before, fingerprint(batch, 4, [0, 2]), rows=False) is None
    change(batch)
    assert difference(before, fingerprint(batch, 4, [0, 2]), rows=False) is not None


def test_jagged_tensors_of_the_same_numbers_are_alike():
    assert alike([jagged(1.0)], [jagged(1.0)])
    assert not alike([jagged(1.0)], [jagged(2.0)])


def test_rounding_is_no_change_and_odd_objects_are_passed_over():
    x, odd = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), [object(), Slots(), print, None]
    before = fingerprint([x, odd], 4, [0, 3])
    assert difference(before, fingerprint([x.double() * (1 + 1e-7), odd], 4, [0, 3]), rows=True) is None
    assert difference(before, fingerprint([x.half(), odd], 4, [0, 3]), rows=False) is None
    assert difference(before, fingerprint([x * 1.01, odd], 4, [0, 3]), rows=True) is not None
    assert splits(before)
    cyclic = {"x": x}
    cyclic["self"] = cyclic
    assert len(fingerprint(cyclic, 4, [0])) == 1
