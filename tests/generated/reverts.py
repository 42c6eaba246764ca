"""How each guard or mend is taken away again, so that the generator can be seen to find the fault."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lightning_influence.gradients.reduction import Reduction


@dataclass(frozen=True)
class Revert:
    """A way to take something away.

    Args:
        off: (monkeypatch) -> None.
        where: (configuration) -> bool: the fits that may show it, so that few are needed.
    """

    off: Any
    where: Any


def reduction_not_probed(patch):
    patch.setattr("lightning_influence.setting.session.probe", lambda *args: Reduction.MEAN)


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


REVERTS = {
    "the reduction is probed": Revert(reduction_not_probed, lambda c: c.loss in ("contrastive", "ce sum")),
    "the module's hooks are called": Revert(hooks_not_called, lambda c: c.hooks.endswith("in module")),
    "the loader's collate is used": Revert(collate_forgotten, lambda c: c.loader == "normalising collate"),
    "a sum is no mean": Revert(loss_always_a_mean_in_exposure, lambda c: c.loss == "ce sum"),
    "checkpoints are loaded": Revert(weights_not_loaded, lambda c: c.module in ("mlp", "linear")),
    "attributes are restored": Revert(not_restored, lambda c: c.module in ("plain tensors", "centre")),
}
