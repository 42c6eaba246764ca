"""Models of independent seeds, each trained by the user's own Trainer."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.refit.pool import Failure, Job, train_all, workers
from lightning_influence.refit.recipe import Recipe, quiet_lightning
from lightning_influence.refit.store import TrainedModel, digest_of
from lightning_influence.timing import seconds_of


@dataclass
class Independent:
    """Trains each model from its own seed, in this process or by joblib.

    Args:
        recipe: how one model is trained.
        n_jobs: processes; None: those of a ``joblib.parallel_config`` around the call, otherwise only this process.
    """

    recipe: Recipe
    n_jobs: int | None = None
    seeded: bool = True
    _checked: bool = False

    def identity(self) -> dict[str, Any]:
        """Hash of the untrained model of seed 0 and of the hyper-parameters that can be read from the factories."""
        recipe = self.recipe
        with isolated_random_state(), quiet_lightning():
            module, trainer = recipe.make_module(), recipe.make_trainer()
            loader = recipe.make_dataloader(Subset(recipe.dataset, range(len(recipe.dataset))))
            optimizers: Any = None
            with contextlib.suppress(Exception):  # it may use a Trainer, and none is attached yet
                optimizers = repr(module.configure_optimizers())
        settings = {
            "hparams": {name: repr(value) for name, value in getattr(module, "hparams", {}).items()},
            "optimizers": optimizers if optimizers is None or " at 0x" not in optimizers else None,
            "trainer": [trainer.max_epochs, trainer.max_steps, trainer.accumulate_grad_batches],
            "clipping": [
                trainer.gradient_clip_val,
                trainer.gradient_clip_algorithm and str(trainer.gradient_clip_algorithm),
            ],
            "batch_size": getattr(loader, "batch_size", None),
        }
        return {"seeds": "independent", "recipe": digest_of(self.initial(0), **settings)}

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The weights of the untrained model of a seed."""
        return self.recipe.initial(seed)

    def train_all(
        self, jobs: Sequence[Job], take: Callable[[Sequence[TrainedModel]], None], done: Callable[[int], Any]
    ) -> list[Failure]:
        """Trains models, passes each to ``take`` as it is finished, and returns the jobs that failed twice."""

        def finished(model: TrainedModel) -> None:
            take([model])
            done(1)

        if not self._checked:
            self.recipe.check()
            self._checked = True
        return train_all(self.recipe.train, jobs, self.n_jobs, finished)

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Estimate the seconds of training models, by training one on two small parts of its data."""
        membership, seed = jobs[0]
        ids = membership.nonzero()[:, 0]

        def took(share: int) -> float:
            part = torch.zeros_like(membership)
            part[ids[: max(1, len(ids) // share)]] = True
            return seconds_of(lambda: self.recipe.train(part, seed))

        try:
            short, long = took(32), took(8)
            each = short + max(0.0, long - short) * (1 - 1 / 32) / (1 / 8 - 1 / 32)
        except ValueError:  # no step is taken on so little
            each = took(1)
        return each * len(jobs) / workers(self.n_jobs)
