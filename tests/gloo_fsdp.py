"""A fit whose two processes share the weights (FSDP 2): python gloo_fsdp.py FOLDER [plain] [fails] [adam] [steps]."""

import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from fits import QUIET, leaves_its_processes, loader, seeded
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.utils.data import TensorDataset

import lightning_influence as li

N = 23


class Sharded(pl.LightningModule):
    """A small classifier in float64, with tied and frozen weights and a buffer that is not saved."""

    def __init__(self, adam=False):
        super().__init__()
        self.adam = adam
        self.first, self.second, self.last = (torch.nn.Linear(*size).double() for size in ((4, 5), (5, 5), (5, 3)))
        self.tied = torch.nn.Linear(5, 5).double()
        self.tied.weight = self.second.weight
        self.last.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 0.9, dtype=torch.float64), persistent=False)

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (self.first, self.last, self) if self.device_mesh is not None else ():
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        hidden = self.second(self.first(x).tanh()).tanh()
        return self.last(self.tied(hidden).tanh() * self.scale)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


class Fails(pl.Callback):
    """The recording of the second process fails within the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            influence = next(c for c in trainer.callbacks if isinstance(c, li.Influence))
            if influence._recorder is not None:
                influence.give_up(trainer, RuntimeError("this process has no more disk"))


class Whole(pl.Callback):
    """Writes the weights at the end of the fit, and the state of the optimizer."""

    def on_train_end(self, trainer, pl_module):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(pl_module, options=StateDictOptions(full_state_dict=True))
        pl_module.reshard()
        names = {p: name for name, p in pl_module.named_parameters()}
        state = {
            names[p]: {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()}
            for p, values in trainer.optimizers[0].state.items()
        }
        torch.save((whole, state), folder / f"whole-{trainer.global_rank}.pt")


if __name__ == "__main__":
    leaves_its_processes()
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    schedule = {"every_n_train_steps": 2} if "steps" in sys.argv else {}
    influence = li.Influence([li.TracInCP()], data(5, 2), dirpath=folder / "influence", **schedule)
    callbacks = [Fails()] * ("fails" in sys.argv) + [influence] * ("plain" not in sys.argv) + [Whole()]
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = pl.Trainer(
        **QUIET
        | {"devices": 2, "strategy": strategy, "max_epochs": 3, "callbacks": callbacks}
        | ({"gradient_clip_val": 0.1} if "clip" in sys.argv else {})
    )
    module = seeded(Sharded, adam="adam" in sys.argv)
    trainer.fit(module, loader(data(N, 1)), loader(data(5, 2)))
    torch.save((influence.scores.reasons, influence.scores.why), folder / f"reasons-{trainer.global_rank}.pt")
