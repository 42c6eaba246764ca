"""What cannot be recorded is said once, with cause and way out, and training is what it would be without the guest."""

import copy
import random
import warnings

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET, Indexed, Net, fit, loader, recorded, seeded
from torch.utils.data import DataLoader

from lightning_influence import HyDRA, Influence, MissingEvidence, TracInCP
from lightning_influence.capture import recorder, steps, windows
from lightning_influence.capture.identity import _taps
from lightning_influence.capture.places import CannotRecord, check_strategy
from lightning_influence.capture.states import gather_state
from lightning_influence.methods.tracin_ideal import TracInIdeal

OURS = ("`Influence`", "tracked", "`sample_id")
NOT_RECORDED = "does not record this fit, which goes on without it"


def both(influence, make=Net, data=loader, **options):
    """Fit without and with the callback: weights, batches and random states must be the same; returns warnings."""
    ends = []
    for callbacks in ([], [influence]):
        random.seed(3)
        module = seeded(make)
        made = data()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = fit(module, made, *callbacks, **options)
        ends.append((module.state_dict(), module.seen, torch.get_rng_state(), random.getstate()))
    (plain, *others), (watched, *same) = ends
    assert str(others) == str(same)
    assert plain.keys() == watched.keys()
    for key, value in plain.items():
        assert torch.equal(watched[key], value)
    assert not _taps
    assert "process_dataloader" not in vars(trainer.strategy)
    assert not isinstance(made, DataLoader) or not hasattr(type(made), "_influence_original")
    return [str(w.message) for w in said if any(word in str(w.message) for word in OURS)]


def assert_not_recorded(influence, said, *fragments):
    """One warning, and the same reason wherever a user looks for results."""
    (text,) = said
    assert NOT_RECORDED in text
    assert influence.scores == {}
    with pytest.raises(KeyError) as no_scores:
        influence.scores["TracInCP"]
    for fragment in fragments:
        assert fragment in text
        assert fragment in str(no_scores.value.args[0])
    if influence.run_dir is None:
        with pytest.raises(MissingEvidence) as nothing:
            _ = influence.attributor
        assert fragments[0] in str(nothing.value)


# ---- modules, strategies, disks that cannot be recorded -------------------------------------------------------------


class Fetches(Net):
    def training_step(self, dataloader_iter):
        batch = next(dataloader_iter)[0]
        return super().training_step(batch, 0)


class NamesRaise(Net):
    """A module that hides the names of its buffers."""

    def named_buffers(self, *args, **kwargs):
        raise NotImplementedError("this module has no names")


class Foreign:
    """What Lightning accepts as an optimizer, though torch did not make it."""

    def __init__(self, inner):
        self.inner = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def zero_grad(self, *args, **kwargs):
        self.inner.zero_grad(*args, **kwargs)

    def step(self, *args, **kwargs):
        return self.inner.step(*args, **kwargs)


class ForeignOptimizer(Net):
    def configure_optimizers(self):
        return Foreign(torch.optim.SGD(self.parameters(), lr=0.1))


MODULES = {
    "a step that fetches its batch": (Fetches, ("training_step(self, dataloader_iter)", "Take `batch` instead")),
    "names that raise": (NamesRaise, ("NotImplementedError", ".py:", "this module has no names")),
    "an optimizer that torch did not make": (ForeignOptimizer, ("got Foreign", "`torch.optim.Optimizer`")),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_cannot_be_recorded_is_trained(name, tmp_path):
    make, fragments = MODULES[name]
    influence = Influence([TracInCP()], queries=Indexed(3), dirpath=tmp_path / "influence")
    said = both(influence, make)
    assert_not_recorded(influence, said, *fragments)
    assert not list(tmp_path.glob("influence/run-*"))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy"])
def test_strategies_that_hide_steps_or_weights_are_refused_by_name(name):
    strategy = type(f"My{name}", (type(name, (), {}),), {})()
    with pytest.raises(CannotRecord, match=f"got 'My{name}'"):
        check_strategy(strategy, None)


def test_a_strategy_that_cannot_be_recorded_is_used(tmp_path):
    from pytorch_lightning.strategies import SingleDeviceStrategy

    shards = type("FSDPStrategy", (SingleDeviceStrategy,), {})
    influence = Influence([TracInCP()], queries="train", dirpath=tmp_path / "influence")
    said = both(influence, strategy=shards(device="cpu"), accelerator="auto", devices="auto")
    assert_not_recorded(influence, said, "FSDP shards the weights", "strategy='ddp'")
    assert not (tmp_path / "influence").exists()


def test_a_folder_that_cannot_be_made_leaves_the_fit_alone(tmp_path):
    (tmp_path / "file").write_text("")
    influence = Influence(dirpath=tmp_path / "file" / "below")
    assert_not_recorded(influence, both(influence), "file/below`, got 'Not a directory'", "Pass another `dirpath=`")


def test_a_folder_that_becomes_unwritable_leaves_the_fit_alone(tmp_path):
    class Spoils(Net):
        def on_fit_start(self):
            if self.trainer.callbacks and isinstance(self.trainer.callbacks[0], Influence):
                (tmp_path / "late").write_text("")

    influence = Influence(dirpath=tmp_path / "late")
    assert_not_recorded(influence, both(influence, Spoils), "to create a folder in `", "Pass another `dirpath=`")


class Slots(DataLoader):
    """A loader whose class cannot be changed: its instances are laid out otherwise."""

    __slots__ = ("more",)


class Unsized(Indexed):
    def __len__(self):
        raise RuntimeError("the length is only known at the end")


class Batches:
    def __iter__(self):
        return iter(loader())


LOADERS = {
    "slots": lambda: Slots(Indexed(), 4, shuffle=True),
    "a dataset whose length raises": lambda: DataLoader(Unsized(), 4, sampler=list(range(23))),
    "a loader that torch did not make": Batches,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_of_any_kind_is_trained_on(name, tmp_path):
    influence = Influence(dirpath=tmp_path)
    said = both(influence, data=LOADERS[name])
    rows = influence.trajectory.steps["ids"].to_pylist()
    assert len(rows) == 12
    if any(row is None for row in rows):
        assert len(said) == 1
        assert "does not know which examples are in a batch" in said[0]
        assert "`sample_id=`" in said[0]
    else:
        assert said == []


def test_a_sample_id_that_raises_leaves_the_fit_alone(tmp_path):
    influence = Influence(dirpath=tmp_path, sample_id=lambda batch: batch["nothing"])
    (text,) = both(influence)
    assert "KeyError: 'nothing'" in text
    assert len(influence.trajectory.steps) == 12


def test_a_length_that_raises_is_no_argument_of_the_callback(tmp_path):
    influence = Influence([TracInCP()], queries=Indexed(3), dirpath=tmp_path)
    both(influence, data=LOADERS["a dataset whose length raises"])
    assert "the length is only known at the end" in influence.scores.reasons["TracInCP"]


def test_weights_without_values_are_named():
    with pytest.raises(CannotRecord, match=r"on the meta device.*`configure_model`"):
        gather_state(pl.Trainer(**QUIET), torch.nn.Linear(2, 2, device="meta"))


class Lazy(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.layer = torch.nn.LazyLinear(1)


@pytest.mark.filterwarnings("ignore:.*uninitialized.*", "ignore:Lazy modules")
def test_lazy_layers_are_recorded_from_their_first_forward_pass(tmp_path):
    influence = Influence(dirpath=tmp_path)
    assert both(influence, Lazy) == []
    first, *_, last = influence.trajectory.checkpoints
    assert (first.step, last.step) == (0, 12)
    module = seeded(Lazy)
    torch.manual_seed(1)
    first_order = list(loader())  # what the fit drew before the weights
    del first_order
    assert first.load().parameters["layer.weight"].shape == (1, 4)
    assert influence.trajectory.exposure(1, "mean", 23).sum() == pytest.approx(0.1 * 6)
    fit(module, loader(), max_epochs=2)
    torch.testing.assert_close(last.load().parameters["layer.weight"], module.layer.weight.detach(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*uninitialized.*", "ignore:Lazy modules")
def test_a_lazy_layer_that_no_batch_reaches_is_left_out(tmp_path):
    class Unreached(Net):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.LazyLinear(3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

    influence = Influence(dirpath=tmp_path)
    torch.manual_seed(0)
    module = Unreached()
    fit(module, loader(), influence)
    assert [c.step for c in influence.trajectory.checkpoints] == [0, 6, 12]
    assert set(influence.trajectory.checkpoints[0].load().parameters) == {"layer.weight", "layer.bias"}


# ---- errors of our own ----------------------------------------------------------------------------------------------

PLACES = {
    "the start": (recorder.Recorder, "starts"),
    "an epoch's start": (recorder.Recorder, "epoch_starts"),
    "a batch's start": (recorder.Recorder, "batch_starts"),
    "before backward": (recorder.Recorder, "before_backward"),
    "before zero_grad": (windows.AccumulationWindows, "before_zero_grad"),
    "before a step": (steps.StepRecorder, "before_step"),
    "inside a step": (steps.StepRecorder, "_settings_entry"),
    "a batch's end": (recorder.Recorder, "batch_ended"),
    "an epoch's end": (recorder.Recorder, "epoch_ended"),
    "the end": (recorder.Recorder, "ended"),
    "writing": (recorder.Recorder, "_write_steps"),
    "reading random states": (steps, "read_generators"),
}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_any_hook_ends_the_recording_only(place, late, tmp_path, monkeypatch):
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > (8 if late else 0):
            raise ZeroDivisionError("of our own")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    influence = Influence([TracInCP()], queries=Indexed(3), dirpath=tmp_path)
    said = both(influence)
    if len(calls) > (8 if late else 0):
        assert_not_recorded(influence, said, "ZeroDivisionError", "of our own")
    if late and place not in ("an epoch's start", "an epoch's end", "the start", "the end", "writing"):
        notes = " ".join(influence.trajectory.notes)
        assert "the fit went on: ZeroDivisionError" in notes
        assert "The fit did not finish" not in notes


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_errors_of_the_user_pass(error, tmp_path, monkeypatch):
    class Breaks(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                raise error

    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(recorder.Recorder, "interrupted", fails)
    with pytest.warns(UserWarning, match=NOT_RECORDED), pytest.raises((Boom, SystemExit)):
        fit(seeded(Breaks), loader(), Influence(dirpath=tmp_path))


class SampleRaises(Indexed):
    def __getitem__(self, i):
        if i == 7:
            raise Boom
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_users_data_pass(workers, tmp_path):
    with pytest.raises(Boom):
        fit(seeded(Net), loader(SampleRaises(), num_workers=workers), Influence(dirpath=tmp_path))


@pytest.mark.parametrize("method", [HyDRA(mode="during_fit"), TracInIdeal()], ids=lambda method: method.name)
def test_a_module_that_a_tracker_cannot_follow_is_trained(method, tmp_path):
    class TrainOnly(Net):
        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("only in train mode")
            return super().training_step(batch, batch_idx)

    influence = Influence([method], queries=Indexed(3), dirpath=tmp_path)
    said = both(influence, TrainOnly, data=lambda: loader(batch_size=1))
    assert len(said) == 1
    assert "is no longer tracked; the fit goes on." in said[0]
    assert "only in train mode" in said[0]
    with pytest.raises(KeyError, match="only in train mode"):
        influence.scores[method.name]
    assert influence.trajectory.finished


# ---- copies, other Trainers -----------------------------------------------------------------------------------------


class Copies(pl.Callback):
    """Another library that works on copies of the callbacks."""

    def __init__(self, when):
        self.when, self.copies = when, []

    def on_fit_start(self, trainer, pl_module):
        if self.when == "before":
            trainer.callbacks[:] = [copy.deepcopy(c) if isinstance(c, Influence) else c for c in trainer.callbacks]
            self.copies += [c for c in trainer.callbacks if isinstance(c, Influence)]

    def on_train_batch_end(self, trainer, *_):
        if self.when == "during":
            self.copies.append(copy.deepcopy([c for c in trainer.callbacks if c is not self]))  # no copies of copies


def test_copies_of_the_callbacks_hold_no_model_and_change_nothing(tmp_path):
    influence, copies = Influence(dirpath=tmp_path / "a"), Copies("during")
    module = seeded(Net)
    fit(module, loader(), influence, copies)
    assert recorded(influence.trajectory) == module.seen
    assert all(c._recorder is None and c._module is None for c in copies.copies[3] if isinstance(c, Influence))
    again = copy.deepcopy(influence)
    fit(seeded(Net), loader(), again)
    assert again.run_dir != influence.run_dir
    assert len(again.trajectory.steps) == 12


def test_a_copy_that_takes_the_place_of_the_callback_records(tmp_path):
    copies, module, made = Copies("before"), seeded(Net), loader()
    fit(module, made, Influence(dirpath=tmp_path), copies)
    assert recorded(copies.copies[0].trajectory) == module.seen
    assert type(made) is DataLoader
    assert not _taps


class Adds(pl.Callback):
    def __init__(self, influence):
        self.influence = influence

    def on_fit_start(self, trainer, pl_module):
        trainer.callbacks.append(self.influence)


def test_a_callback_that_is_added_late_says_so(tmp_path):
    influence = Influence(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="added or copied later, perhaps by another library"):
        fit(seeded(Net), loader(), Adds(influence))
    with pytest.raises(KeyError, match="Pass it to `Trainer"):
        influence.scores["TracInCP"]


def test_one_callback_in_two_trainers_at_once_records_the_first(tmp_path):
    influence = Influence(dirpath=tmp_path)

    class Distils(Net):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                fit(seeded(Net), loader(), influence, max_epochs=1)

    module = seeded(Distils)
    with pytest.warns(UserWarning, match="Give each Trainer an `Influence` of its own"):
        fit(module, loader(), influence)
    assert recorded(influence.trajectory) == module.seen
    assert influence.trajectory.finished
    assert not _taps


def test_one_callback_in_two_trainers_one_after_the_other(tmp_path):
    influence = Influence(dirpath=tmp_path)
    for k in range(2):
        module = seeded(Net)
        fit(module, loader(), influence)
        assert influence.run_dir.name == f"run-{k}"
        assert recorded(influence.trajectory) == module.seen
