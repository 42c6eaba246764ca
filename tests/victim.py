"""A slow fit in a process of its own, to be killed or starved: python victim.py FOLDER [full | alone | tracked]."""

import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from capture.test_resume import by_epoch
from fits import Indexed, Net, fit, seeded
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_influence.callback.influence import Influence


class Slow(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.01)

    def on_train_epoch_start(self, trainer, pl_module):
        print("training", flush=True)
        if trainer.current_epoch == 2 and "full" in sys.argv:  # from here on no file may be longer than this
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def show(message, category, *_, **__):
    print(category.__name__, message, flush=True)


warnings.showwarning = show
torch.set_num_threads(1)
folder = Path(sys.argv[1])
full = "full" in sys.argv or "alone" in sys.argv  # without checkpoints of Lightning's own
options = {}
if "tracked" in sys.argv:
    from tracking.test_resume import METHODS

    options = {"methods": METHODS, "queries": Indexed(5), "max_cost": 1e9}
influence = Influence(dirpath=folder / "influence", every_n_train_steps=4, **options)
# At the ends of epochs: in the middle of one, or at its last batch, a plain DataLoader begins the epoch anew.
at_ends = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
keep = [] if full else [ModelCheckpoint(folder / "ckpt", **at_ends, save_top_k=1, save_last=True)]
last = folder / "ckpt" / "last.ckpt"
module = seeded(Net, momentum=0.9, schedule="epoch")
fit(
    module,
    by_epoch(),
    influence,
    Slow(),
    *keep,
    max_epochs=20,
    enable_checkpointing=not full,
    ckpt_path=last if last.exists() else None,
)
print("finished", len(module.seen), flush=True)
