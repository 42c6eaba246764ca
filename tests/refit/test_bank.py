"""The bank: one model never trained twice, everything kept that was finished, clear errors."""

import multiprocessing
import shutil
import time
import warnings

import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.utils.data import DataLoader

from lightning_influence import DataShapley, Downsampling, LeaveOneOut, MissingEvidence, Refit
from lightning_influence.numerics.subsets import fixed_size
from lightning_influence.refit import pool
from lightning_influence.refit.pool import train_all
from lightning_influence.refit.store import ModelStore, TrainedModel, key_of, layout_of
from refit.ridge import ClosedRefit, Ridge, Solved, attributor, data, make_loader, make_trainer

TEST = data(3, seed=1)


def closed(folder, train, **options):
    refit = ClosedRefit(folder, train, **options)
    return attributor(train, refit), refit


def independent(folder, train=None, module=Solved, trainer=make_trainer, loader=make_loader, **options):
    train = data(6) if train is None else train
    refit = Refit(module, trainer, loader, "independent", folder, **options)
    return attributor(train, refit, Solved())


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_restart_trains_nothing_twice_and_answers_the_same(tmp_path):
    train = data()
    first, refit = closed(tmp_path, train)
    scores = [first.score(m, TEST).values for m in (LeaveOneOut(), Downsampling(10))]
    assert len(refit.way.trained) == 13 + 10
    second, again = closed(tmp_path, train)
    for method, expected in zip((LeaveOneOut(), Downsampling(10)), scores, strict=True):
        assert torch.equal(second.score(method, TEST).values, expected)
    assert again.way.trained == []
    second.score(Downsampling(14), TEST)  # more of them: only the new ones
    assert len(again.way.trained) == 4


def test_models_come_back_as_they_were(tmp_path):
    weights = {"a": torch.randn(3, 2), "b": torch.tensor(7), "c": torch.randn(2).bfloat16(), "d": torch.empty(0, 3)}
    membership = torch.tensor([True, False, True, True, False, True, False, False, True])
    store = ModelStore(tmp_path, {"n_train": 9}, layout_of(weights))
    store.add([TrainedModel(membership, 5, 0.5, weights)])
    (found,) = ModelStore(tmp_path, {"n_train": 9}, layout_of(weights)).weights([key_of(membership, 5)])
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], weights[n]) and found[n].dtype == weights[n].dtype for n in weights)
    row = pa.ipc.open_file(next(tmp_path.glob("models-*.arrow"))).read_all().to_pylist()[0]
    bits = [bool(row["membership"][i // 8] >> (i % 8) & 1) for i in range(9)]
    assert (bits, row["seed"]) == (membership.tolist(), 5)


def test_half_a_file_is_seen_and_its_models_are_trained_again(tmp_path):
    train = data()
    first, _ = closed(tmp_path, train)
    expected = first.score(LeaveOneOut(), TEST).values
    first.score(Downsampling(10), TEST)
    path = min(tmp_path.glob("models-*.arrow"))
    path.write_bytes(path.read_bytes()[:-200])
    second, refit = closed(tmp_path, train)
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(second.score(LeaveOneOut(), TEST).values, expected)
    assert len(refit.way.trained) == 13


def test_a_file_that_was_being_written_is_not_there(tmp_path):
    train = data()
    first, _ = closed(tmp_path, train)
    first.score(Downsampling(5), TEST)
    (tmp_path / ".models-000009.arrow.tmp").write_bytes(b"half")
    second, refit = closed(tmp_path, train)
    second.score(Downsampling(5), TEST)
    assert refit.way.trained == []


@pytest.mark.parametrize("what", ["data", "length", "module"])
def test_a_bank_of_something_else_is_refused(tmp_path, what):
    train = data()
    closed(tmp_path, train)[0].score(Downsampling(5), TEST)
    other = data(12, seed=9) if what == "data" else data(13) if what == "length" else train
    asker, refit = closed(tmp_path, other)
    if what == "module":
        refit.way.initial = lambda seed: {"layer.weight": torch.zeros(1, 9, dtype=torch.float64)}
    with pytest.raises(ValueError, match="were trained on something else: choose another `dirpath`"):
        asker.score(Downsampling(5), TEST)


def test_two_at_work_on_one_folder(tmp_path):
    asker, refit = closed(tmp_path, data())
    other, _ = closed(tmp_path, data())
    with (
        refit.models.store.writing(),
        pytest.raises(RuntimeError, match="the only process that trains models"),
    ):
        other.score(Downsampling(5), TEST)
    other.score(Downsampling(5), TEST)
    assert asker.score(Downsampling(5), TEST) is not None
    assert refit.way.trained == []  # what the other has trained meanwhile is seen


def test_a_lock_file_that_nobody_holds_blocks_nobody(tmp_path):
    asker, refit = closed(tmp_path, data())
    (refit.models.store.folder / ".lock").write_text("12345")  # as earlier versions leave it
    assert asker.score(Downsampling(5), TEST) is not None


def hold(store, marker):
    with store.writing():
        marker.touch()
        time.sleep(60)


def test_a_killed_process_holds_nothing_back(tmp_path):
    asker, refit = closed(tmp_path, data())
    child = multiprocessing.get_context("fork").Process(target=hold, args=(refit.models.store, tmp_path / "held"))
    child.start()
    while not (tmp_path / "held").exists():
        assert child.is_alive()
        time.sleep(0.005)
    with pytest.raises(RuntimeError, match=r"got another one that does\. Wait for it"):
        asker.score(Downsampling(5), TEST)
    child.kill()
    child.join()
    assert asker.score(Downsampling(5), TEST) is not None


# ---- the user's own Trainer ------------------------------------------------------------------------------------------


def test_models_are_those_that_the_user_would_train_alone(tmp_path):
    train = data(6)
    asker = independent(tmp_path, train, module=Ridge, loader=shuffled)
    asker.score(Downsampling(3, fraction=0.5), TEST)
    models = asker.refit.models
    membership = fixed_size(6, 3, 3, 0)
    for seed, found in enumerate(models.store.weights([key_of(m, s) for s, m in enumerate(membership)])):
        pl.seed_everything(seed, verbose=False)
        module, trainer = Ridge(), make_trainer()
        trainer.fit(module, shuffled(torch.utils.data.Subset(train, membership[seed].nonzero()[:, 0].tolist())))
        assert torch.equal(found["layer.weight"], module.layer.weight.detach())


def shuffled(subset):
    return DataLoader(subset, batch_size=2, shuffle=True)


def test_the_random_state_and_the_module_are_left_alone(tmp_path):
    asker = independent(tmp_path)
    weight, state = asker.module.layer.weight.clone(), torch.get_rng_state()
    asker.score(LeaveOneOut(), TEST)
    assert torch.equal(asker.module.layer.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert asker.module.training


def test_another_recipe_is_another_bank(tmp_path):
    independent(tmp_path).score(Downsampling(2), TEST)

    def longer():
        return pl.Trainer(**QUIET, max_epochs=2)

    with pytest.raises(ValueError, match="bank of models with `recipe`"):
        independent(tmp_path, trainer=longer).score(Downsampling(2), TEST)


def test_another_way_of_clipping_is_another_bank(tmp_path):
    def clipping(how):
        return lambda: pl.Trainer(**QUIET, max_epochs=1, gradient_clip_val=1.0, gradient_clip_algorithm=how)

    independent(tmp_path, module=Ridge, trainer=clipping("norm")).score(Downsampling(2), TEST)
    with pytest.raises(ValueError, match="bank of models with `recipe`"):
        independent(tmp_path, module=Ridge, trainer=clipping("value")).score(Downsampling(2), TEST)


SHARED = Solved()


def sharing():
    module = Solved()
    module.layer.weight = SHARED.layer.weight
    return module


class Stuck(Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Diverging(Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=float("inf"))


def one_trainer():
    return TRAINER


TRAINER = make_trainer()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": lambda: SHARED}, ValueError, "got the same one twice: each model would continue"),
        ({"module": sharing}, ValueError, "its parameters are shared"),
        ({"trainer": one_trainer}, ValueError, "a Trainer that has finished does not train again"),
    ],
)
def test_factories_that_make_nothing_new(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        independent(tmp_path, **options).score(LeaveOneOut(), TEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": lambda: pl.Trainer(**QUIET, max_epochs=0)}, "to train, got 0 steps"),
        ({"module": Stuck}, "that left the weights unchanged"),
        ({"module": Diverging}, "finite weights after training, got NaN or infinity in `layer.weight`"),
    ],
)
def test_a_trainer_that_does_not_train(tmp_path, options, message):
    with pytest.warns(UserWarning, match="once more"), pytest.raises(RuntimeError, match=message):
        independent(tmp_path, data(3), **options).score(LeaveOneOut(examples=(0,)), TEST)


class Moody(Solved):
    """Cannot do without example 2; the first time that it sees all, it fails by accident."""

    accidents = 0

    def training_step(self, batch, batch_idx):
        if len(batch[0]) == 6 and Moody.accidents == 0:
            Moody.accidents += 1
            raise OSError("an accident")
        if not (batch[0] == data(6).tensors[0][2]).all(1).any():
            raise ValueError("nothing without number 2")
        return super().training_step(batch, batch_idx)


def test_a_failed_refit_is_reported_tried_again_and_named_and_the_rest_goes_on(tmp_path):
    asker = independent(tmp_path, module=Moody)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = asker.score(LeaveOneOut(), TEST)
    said = [str(w.message) for w in seen if "The model" in str(w.message)]
    assert len([s for s in said if "an accident" in s and "tried once more" in s]) == 1
    assert len([s for s in said if "without [2]" in s and "tried once more" in s]) == 1
    assert len([s for s in said if "without [2]" in s and "left out" in s]) == 1
    assert scores.values.isnan().any(0).tolist() == [False, False, True, False, False, False]
    assert "nothing without number 2" in " ".join(scores.notes)
    assert len(asker.refit.models.store) == 6


def test_subsets_without_a_class_are_counted_and_empty_ones_refused(tmp_path):
    train = data(classes=True)
    asker, refit = closed(tmp_path, train)
    scores = asker.score(Downsampling(30, fraction=0.2), TEST)
    note = next(n for n in scores.notes if "no example of class 1" in n)
    assert note.endswith("of 30 subsets hold no example of class 1.")
    with pytest.raises(ValueError, match="got 1 empty ones of 2"):
        refit.models.train(torch.stack([torch.zeros(12), torch.ones(12)]).bool(), [0, 1])
    with pytest.raises(ValueError, match=r"\[model, train\] with 12 training examples, got \[2, 7\]"):
        refit.models.train(torch.ones(2, 7).bool(), [0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Refit(seeds="random"), ValueError, "'fixed', 'independent', got 'random'"),
        (lambda: Refit(removal="delete"), ValueError, "got 'delete'"),
        (lambda: Refit(Solved, seeds="independent"), ValueError, "got make_module"),
        (lambda: Refit(Solved), ValueError, "no factories for `seeds='fixed'`"),
        (lambda: Refit().models, MissingEvidence, "Pass it to `Attributor"),
        (lambda: attributor(data(), Refit()).score(LeaveOneOut(), TEST), MissingEvidence, "captured run for"),
        (lambda: independent(None).score(LeaveOneOut(), TEST), ValueError, "Expected `dirpath` for the models"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_pool_that_breaks_down_again_and_again_is_given_up(monkeypatch):
    def broken(train, jobs, n_jobs):
        raise MemoryError("killed")
        yield

    monkeypatch.setattr(pool, "_results", broken)
    with pytest.warns(UserWarning, match="A worker was lost"), pytest.raises(RuntimeError, match="3 breakdowns"):
        train_all(None, [(torch.ones(2).bool(), 0)], 2, lambda model: None)


def test_processes_without_joblib_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "joblib", None)
    with pytest.raises(ImportError, match=r"lightning-influence\[parallel\]"):
        train_all(None, [(torch.ones(2).bool(), 0)], 2, lambda model: None)


@pytest.mark.slow
def test_processes_give_the_same_models(tmp_path):
    alone, spread = independent(tmp_path / "1"), independent(tmp_path / "2", n_jobs=2)
    expected = alone.score(LeaveOneOut(), TEST).values
    assert torch.equal(spread.score(LeaveOneOut(), TEST).values, expected)


def test_a_bank_moves_with_its_folder(tmp_path):
    first, _ = closed(tmp_path / "here", data())
    first.score(DataShapley(budget=24), TEST)
    shutil.move(tmp_path / "here", tmp_path / "there")
    second, refit = closed(tmp_path / "there", data())
    second.score(DataShapley(budget=24), TEST)
    assert refit.way.trained == []
