"""What a step reads of its Trainer later: the values of the fit, per checkpoint, or a refusal; the fit is unchanged."""

import copy
import dataclasses

import pytest
import pytorch_lightning as pl
import torch
from case import Step, both, mlp
from cases_trainer import Configured, Data, MeanTeacher, Reads, in_place, lazily, other_data, through_data
from fits import QUIET
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, HyDRA, Influence, TracInCP, Trajectory

BOTH = both(5)


def made():
    return BOTH["train"](), BOTH["queries"]()


def fit(module, folder=None, **options):
    callbacks = [*([] if folder is None else [Influence(dirpath=folder)]), *options.pop("callbacks", ())]
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": callbacks, **options})
    trainer.fit(module, datamodule=Data())
    return trainer


def new(read):
    torch.manual_seed(0)
    return Reads(read).double()


def rate(module):
    return module.trainer.optimizers[0].param_groups[0]["lr"]


def scheduled(module):
    return module.lr_schedulers().get_last_lr()[0]


def scored(module, trajectory, method, trainer=None, **options):
    train, queries = made()
    return Attributor(module, DataLoader(train, 3), trajectory, trainer, **options).score(method, queries).values


@pytest.mark.parametrize("read", [rate, scheduled], ids=["optimizer", "scheduler"])
def test_a_value_that_changes_is_that_of_each_checkpoint(read, tmp_path):
    module = new(read)
    fit(module, tmp_path)
    trajectory = Trajectory.load(tmp_path)
    rates = {1: 0.025, 2: 0.0125}  # the scheduler had stepped when the checkpoint was written
    expected = sum(  # of a module that is not that of the fit
        scored(new(lambda m, at=at: rates[at]), trajectory, TracInCP(checkpoints=(at,)), check_data=False)
        for at in rates
    )
    for asked, trainer in ((module, None), (new(read), None), (new(read), pl.Trainer(**QUIET))):
        torch.testing.assert_close(scored(asked, trajectory, TracInCP(), trainer), expected, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"changed during the fit and is known at checkpoints only.*TracInCP"):
        scored(new(read), trajectory, HyDRA())


def test_a_method_is_not_called_again_which_a_note_says(tmp_path):
    read = lambda m: m.trainer.datamodule.weight(power=2)  # noqa: E731
    fit(new(read), tmp_path)
    train, queries = made()
    scores = Attributor(new(read), DataLoader(train, 3), Trajectory.load(tmp_path)).score(TracInCP(), queries)
    assert "`trainer.datamodule.weight(power=2)` is given as the fit's first batch had it." in scores.notes


def test_a_trainer_that_validated_something_else_gives_the_values_of_the_fit(tmp_path):
    module = new(lambda m: m.trainer.datamodule.num_classes * m.trainer.num_training_batches)
    trainer = fit(module, tmp_path)
    expected = scored(module, Trajectory.load(tmp_path), TracInCP())
    other = Data()
    other.num_classes, other.val_dataloader = 7, other.train_dataloader
    module.validation_step = lambda batch, batch_idx: None
    trainer.validate(module, datamodule=other, verbose=False)
    assert trainer.datamodule is other
    torch.testing.assert_close(scored(module, Trajectory.load(tmp_path), TracInCP()), expected, rtol=0, atol=0)


def test_a_run_without_a_record_refuses_by_name_unless_its_trainer_is_passed(tmp_path):
    module = new(lambda m: m.trainer.max_epochs * m.trainer.num_training_batches)
    fitted = fit(module, tmp_path)
    old = dataclasses.replace(Trajectory.load(tmp_path), trainer_values=())
    with pytest.raises(ValueError, match=r"Expected `trainer\.max_epochs` as it was in the fit.*no run has recorded"):
        scored(new(module.read), old, TracInCP())
    with pytest.raises(ValueError, match=r"Expected `trainer\.num_training_batches` as it was in the fit"):
        scored(new(module.read), old, TracInCP(), pl.Trainer(**{**QUIET, "max_epochs": 2}))
    right = scored(new(module.read), Trajectory.load(tmp_path), TracInCP())
    torch.testing.assert_close(scored(new(module.read), old, TracInCP(), fitted), right, rtol=0, atol=0)


def harmless(module):
    module.log("a", 1.0)
    trainer = module.trainer
    trainer.strategy.barrier()
    assert module.logger is None
    assert (trainer.training, trainer.sanity_checking, trainer.is_global_zero) == (True, False, True)
    assert trainer.precision == "32-true"
    return trainer.world_size + trainer.global_rank + module.current_epoch


def test_process_stage_and_loggers_are_there_without_a_fit():
    assert scored(new(harmless), None, GradientDot()).isfinite().all()


class Watched(pl.Callback):
    def __init__(self):
        self.kinds = []

    def on_train_batch_end(self, trainer, *_):
        self.kinds.append([type(trainer), type(trainer.datamodule), type(trainer.optimizers[0])])


def everything(module):
    trainer = module.trainer
    module.log("loss_so_far", float(trainer.global_step))
    found = trainer.max_epochs + trainer.datamodule.weight() + len(trainer.train_dataloader.dataset)
    return found + rate(module) + scheduled(module) + trainer.callback_metrics.get("loss_so_far", 0.0)


def test_the_fit_and_what_it_logs_are_the_same_and_classes_are_put_back(tmp_path):
    watched, modules, logged = Watched(), [new(everything), new(everything)], []
    for module, folder in zip(modules, (None, tmp_path), strict=True):
        trainer = fit(module, folder, callbacks=[watched])
        logged.append(dict(trainer.callback_metrics))
        assert not {"optimizers", "lr_schedulers"} & module.__dict__.keys()
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True))
    assert logged[0] == logged[1]
    assert all(kinds == [pl.Trainer, Data, torch.optim.SGD] for kinds in watched.kinds)


def failing(module):
    assert module.trainer.datamodule.num_classes == 3
    raise KeyError("the step's own")


def test_an_exception_in_the_first_step_puts_classes_back(tmp_path):
    module, data = new(failing), Data()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [Influence(dirpath=tmp_path)]})
    with pytest.raises(KeyError, match="own"):
        trainer.fit(module, datamodule=data)
    assert (type(trainer), type(data)) == (pl.Trainer, Data)
    assert not {"optimizers", "lr_schedulers"} & module.__dict__.keys()


class Saved(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def test_a_resumed_fit_has_the_values_of_both_parts(tmp_path):
    module = new(lambda m: m.trainer.max_epochs)
    fit(module, tmp_path, max_epochs=1, callbacks=[Saved(tmp_path / "half.ckpt")])
    again = pl.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": [Influence(dirpath=tmp_path)]})
    again.fit(module, datamodule=Data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    found = Trajectory.load(tmp_path)
    values = [(step, values["max_epochs"]) for step, values in found.trainer_values]
    assert values == [(0, 1), (3, 3)]


def test_a_replay_refuses_steps_that_write_parameters(tmp_path):
    module = MeanTeacher(in_place).double()
    fit(module, tmp_path)
    with pytest.raises(ValueError, match=r"leave the parameters to the optimizer, got a write into `teacher"):
        scored(module, Trajectory.load(tmp_path), HyDRA())
    assert scored(module, Trajectory.load(tmp_path), TracInCP()).isfinite().all()


class Fails(MeanTeacher):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise ValueError("the step's own")


@pytest.mark.parametrize("write", [in_place, through_data, other_data])
def test_a_refused_score_puts_back_what_the_step_wrote(write):
    module = Fails(write).double()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="the step's own"):
        scored(module, None, GradientDot())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_lazy_layers_that_saw_no_batch_are_refused():
    with pytest.raises(ValueError, match=r"`net\.0\.weight` of a lazy layer.*`trajectory=`"):
        Attributor(lazily(), made()[0])


def test_layers_that_exist_are_not_made_again(tmp_path):
    module = Configured()
    module.configure_model()
    first = copy.deepcopy(module.net.state_dict())
    module.configure_model = lambda: pytest.fail("called")
    Attributor(module, made()[0])
    assert all(torch.equal(first[name], value) for name, value in module.net.state_dict().items())


class Broken(Step):
    def configure_model(self):
        raise RuntimeError("no file")


def test_an_error_in_configure_model_is_explained(tmp_path):
    trained = Step(mlp()).double()
    fit(trained, tmp_path)
    with pytest.raises(ValueError, match=r"`configure_model` raised RuntimeError: no file. Call it before"):
        Attributor(Broken(None), made()[0], Trajectory.load(tmp_path))


class Weight(pl.Callback):
    """Holds a weight of the loss, which grows."""

    weight = 1.0

    def on_train_epoch_start(self, trainer, module):
        self.weight = 1.0 + 3 * trainer.current_epoch


def of_callback(module):
    return next(c.weight for c in module.trainer.callbacks if type(c) is Weight)


def of_later_epochs(module):
    return 1.0 if module.current_epoch == 0 else module.trainer.datamodule.num_classes


def of_a_recorded_object(module):
    known = module.trainer.datamodule.num_classes
    return known if module.current_epoch == 0 else known * float(module.trainer.datamodule.shift[0])


def arguments(module):
    return 1.0 if module.current_epoch == 0 else float(module.trainer.max_epochs + module.trainer.training)


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (of_callback, "callbacks"),
        (of_later_epochs, "datamodule"),
        (of_a_recorded_object, "datamodule.shift"),
        (arguments, None),
        (rate, None),
    ],
)
def test_a_fitted_trainer_answers_what_was_not_recorded_with_a_note(read, path, tmp_path):
    module, (train, queries) = new(read), made()
    trainer = fit(module, tmp_path, callbacks=[Weight()])
    attributor = Attributor(module, DataLoader(train, 3), Trajectory.load(tmp_path), trainer, check_data=False)
    notes = [note for note in attributor.score(TracInCP(), queries).notes if "present value" in note]
    assert len(notes) == (path is not None)
    assert path is None or f"`trainer.{path}` was not recorded" in notes[0]
