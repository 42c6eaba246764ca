"""How each guard or mend is taken away again, so that the generator can be seen to find the fault."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from generated.fitting import Config
from generated.judging import Question
from generated.losses import LOSSES
from generated.truth import BY_INDEX, CARRIES
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.module.snapshot import ModuleSnapshot
from lightning_influence.module.trainer_reads import FitValues
from lightning_influence.setting.token_weights import TokenWeights


@dataclass(frozen=True)
class Revert:
    """A way to take something away.

    Args:
        off: (monkeypatch) -> None.
        where: (configuration) -> bool: the fits that may show it, so that few are needed.
        shows: the kinds of verdict of which one shows it.
        question: asked of each fit; None: those that are drawn.
        configs: further fits, of modules that are not among those that are drawn.
    """

    off: Any
    where: Any
    shows: tuple[str, ...] = ("silently wrong", "changed")
    question: Question | None = None
    configs: tuple[Config, ...] = ()


def hooks_not_called(patch):
    patch.setattr("lightning_influence.module.task.Task.to_device", lambda self, batch: batch)


def collate_forgotten(patch):
    import lightning_influence.data.source as source

    original = source._from_loader
    patch.setattr(source, "_from_loader", lambda *args: dataclasses.replace(original(*args), collate=None))


def loss_always_a_mean_in_exposure(patch):
    patch.setattr(Reduction, "coefficient", lambda self: "mean")


def weights_not_loaded(patch):
    patch.setattr("lightning_influence.module.task.Task.load", lambda self, *args, **kwargs: None)


def not_restored(patch):
    patch.setattr("lightning_influence.module.snapshot.ModuleSnapshot.restore", lambda self: None)


def data_not_compared(patch):
    patch.setattr("lightning_influence.setting.session.check_data", lambda *args: [])


def index_not_looked_for(patch):
    patch.setattr("lightning_influence.setting.batch_index.BatchIndex.differing", lambda self, *args: None)


def no_guard(patch):
    patch.setattr("lightning_influence.gradients.guard.Guard.check", lambda self, *args: None)


def no_guard_at_all(patch):
    no_guard(patch)
    patch.setattr("lightning_influence.gradients.guard.Guard.check_sum", lambda self, *args: None)


def tokens_count_alike(patch):
    no_guard_at_all(patch)  # finds it too
    original = TokenWeights.of

    def ones(self, *args):
        weights = original(self, *args)
        return None if weights is None else torch.ones_like(weights)

    patch.setattr(TokenWeights, "of", ones)


def trainer_values_ignored(patch):
    data_not_compared(patch)  # finds it too, by the losses
    patch.setattr("lightning_influence.setting.session.fit_values", lambda trajectory, given: FitValues(given=given))


def no_copies(patch):
    patch.setattr("lightning_influence.data.examples.Examples.share_of_copies", Nothing(), raising=False)


def parameters_not_put_back(patch):
    no_guard_at_all(patch)  # finds it too
    original = ModuleSnapshot._put_back

    def only_others(self, saved):
        if id(saved.tensor) not in self._names:
            original(self, saved)

    patch.setattr(ModuleSnapshot, "_put_back", only_others)


def collate_may_draw(patch):
    no_guard_at_all(patch)  # finds it too
    patch.setattr("lightning_influence.data.examples.Examples.collate_draws", lambda *args: False)


def numbers_of_the_end(patch):
    patch.setattr("lightning_influence.module.task.put_back", lambda *args: None)


def paths_through_buffers_ignored(patch):
    patch.setattr("lightning_influence.replay.buffer_paths.BufferPaths.check", lambda *args: None)


class Nothing:
    """An attribute that stays None."""

    def __get__(self, owner, kind=None):
        return None

    def __set__(self, owner, value):
        pass


def reach_not_checked(patch):
    from lightning_influence.setting.unreached import Unreached

    patch.setattr(Unreached, "of", staticmethod(lambda *args: Unreached()))
    patch.setattr("lightning_influence.setting.planning.note_on_training", lambda *args: None)  # finds it too


def trainer_answers_itself(patch):
    from lightning_influence.module.trainer_answers import TrainerAnswers

    patch.setattr(TrainerAnswers, "needed", property(lambda self: False))


REVERTS = {
    "the module's hooks are called": Revert(hooks_not_called, lambda c: c.hooks.endswith("in module")),
    "the loader's collate is used": Revert(collate_forgotten, lambda c: c.loader == "normalising collate"),
    "a sum is no mean": Revert(loss_always_a_mean_in_exposure, lambda c: c.loss == "ce sum"),
    "checkpoints are loaded": Revert(weights_not_loaded, lambda c: c.module in ("mlp", "linear")),
    "attributes are restored": Revert(not_restored, lambda c: c.module in ("plain tensors", "centre")),
    "data are compared with the fit's": Revert(
        data_not_compared, lambda c: c.loader == "normalising collate" or c.hooks.endswith("in datamodule")
    ),
    "eval mode reaches what was trained": Revert(
        reach_not_checked, lambda c: c.module == "second head in training" and LOSSES[c.loss].ordinary
    ),
    "the fit's Trainer answers": Revert(
        trainer_answers_itself,
        lambda c: c.module in ("reads estimated_stepping_batches", "reads max_epochs") and LOSSES[c.loss].ordinary,
    ),
    "the batch's index is looked for": Revert(index_not_looked_for, lambda c: c.module in BY_INDEX),
    "examples are checked on every path": Revert(
        no_guard, lambda c: LOSSES[c.loss].ignores and c.mask in ("one odd row", "odd tail")
    ),
    "tokens are counted": Revert(tokens_count_alike, lambda c: c.loss == "token mean" and c.mask == "lengths"),
    "what the fit's Trainer had is recorded": Revert(
        trainer_values_ignored, lambda c: c.module == "reads optimizers" and LOSSES[c.loss].ordinary
    ),
    "two copies stand for one": Revert(
        no_copies,
        lambda c: c.module == "squeezes" and LOSSES[c.loss].ordinary and c.mask in ("none", "lengths"),
        ("refused",),
        Question("dot", "callback", None),
    ),
    "parameters that a step moves are put back": Revert(parameters_not_put_back, lambda c: c.module == "mean teacher"),
    "a collate that draws is refused": Revert(
        collate_may_draw,
        lambda c: c.loader == "mixing collate" and c.loss == "loss=",
        question=Question("dot", "trainer", 7),
    ),
    "numbers are those of the checkpoint": Revert(
        numbers_of_the_end,
        lambda c: False,
        question=Question("tracin", "trainer", 7),
        configs=(Config("anneals", "ce", "none", "in order", "none", 5001),),
    ),
    "a path through a buffer is refused": Revert(
        paths_through_buffers_ignored, lambda c: c.module in CARRIES, question=Question("hydra", "trainer", 7)
    ),
}
