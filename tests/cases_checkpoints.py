"""Cases: what is in the checkpoint files of a fit, and which of their weights are scored."""

import argparse
import copy
import enum
import functools
import os
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from case import Case, Step, both, mlp
from fits import QUIET
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import Influence, Trajectory

DATA = both(5)
N = 8
RATE = 0.1


@dataclass
class Files:
    """What a case wrote.

    Args:
        read: makes the trajectory.
        windows: (weights, coefficient [1, train]) for every checkpoint of the trajectory.
        final: the weights that methods of final weights use; None: the last of the windows.
        weights: of ``Attributor(weights=)``.
    """

    read: Callable[[], Any]
    windows: list[Any]
    final: Any = None
    weights: Any = "last"


def windows(states, steps):
    """The expectation of learning rate x visits between the steps, for every example."""
    spans = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    return [
        (state, torch.full((1, N), RATE * span / N, dtype=torch.float64))
        for state, span in zip(states, spans, strict=True)
    ]


def read(paths, **options):
    return lambda: Trajectory.from_checkpoints(paths, RATE, **options)


def by_hand(zipped=True, change=lambda content: content, pick=lambda folder: folder, **more):
    """Two files with other weights than the module's, and anything else in them."""

    def write(module, folder):
        states = [{k: v + 0.1 * step for k, v in module.state_dict().items()} for step in (1, 2)]
        for step, state in zip((3, 7), states, strict=True):
            content = {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6.0", "state_dict": state}
            content = change({**content, **more})
            torch.save(content, folder / f"{step}.ckpt", _use_new_zipfile_serialization=zipped)
        return Files(read(pick(folder)), windows(states, (3, 7)))

    return write


class Colour(enum.Enum):
    RED = 1


class Config(dict):
    """Like an OmegaConf DictConfig or Lightning's AttributeDict."""


class Settings:
    """A user's class."""

    def __init__(self):
        self.rate = 0.1

    def __setstate__(self, state):
        raise AssertionError("executed")


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def fitted(averaging=None, weights=None, which="last", net=mlp, epochs=3):
    """Files of a real fit; the weights that every epoch ended with are noted by another callback."""

    def write(module, folder):
        raw, averages, trained = [], [], copy.deepcopy(module)

        class Note(pl.Callback):
            def on_train_epoch_end(self, trainer, module):
                raw.append({name: value.clone() for name, value in module.state_dict().items()})
                for other in trainer.callbacks:
                    if isinstance(other, StochasticWeightAveraging):
                        averages.append(copy.deepcopy(other._average_model.state_dict()))

        callbacks = [Note(), Influence(dirpath=folder / "influence"), *([averaging()] if averaging else [])]
        keep = ModelCheckpoint(folder / "ckpt", filename="{epoch}", save_top_k=-1, save_last=True)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [*callbacks, keep]}
        torch.manual_seed(1)
        pl.Trainer(**{**QUIET, **options}).fit(trained, DataLoader(DATA["train"](), 3))
        files = [folder / "ckpt" / f"epoch={epoch}.ckpt" for epoch in range(epochs)]
        states = raw[:epochs]
        if weights == "averaged":  # of EMA, as `load_from_checkpoint` gives them
            states = averages or [torch.load(file, weights_only=True)["state_dict"] for file in files]
        final = {"last": states[-1], "averaged": trained.state_dict()}.get(which)
        if which == "path":
            final = torch.load(files[1], weights_only=True)["state_dict"]
        asked = files[1] if which == "path" else which
        steps = range(3, 3 * epochs + 1, 3)
        return Files(read(folder / "ckpt", weights=weights), windows(states, steps), final, asked)

    return write


def one_of_swa(module, folder):
    files = fitted(swa)(module, folder)
    files.read = read(folder / "ckpt" / "epoch=2.ckpt", weights="averaged")
    return files


def captured(which, averaging=None, net=None):
    """A captured fit without a look at its steps: only methods of final weights are compared."""

    def write(module, folder):
        write_files = fitted(averaging, None, which)
        files = write_files(module, folder)
        keep = torch.load(sorted((folder / "ckpt").glob("epoch=*.ckpt"))[-1], weights_only=True)
        files.read = lambda: Trajectory.load(folder / "influence")
        files.windows = []
        if which == "best":  # without a metric, the newest
            files.final = keep["state_dict"]
        return files

    return write


def ema():
    return EMAWeightAveraging(decay=0.5)


def swa():
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)


def case(name, files, make=lambda: Step(mlp()), **more):
    return Case(name, make, **DATA, files=files, **more)


def refused(name, files, *says, make=lambda: Step(mlp())):
    return Case(name, make, **DATA, files=files, expected="refused", says=says)


def normed():
    return Step(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))


def half_frozen(freeze=True):
    module = Step(mlp())
    if freeze:
        module.net[0].requires_grad_(False)
    return module


def in_hparams(thing):
    return by_hand(hyper_parameters={"it": thing}, callbacks={"Mine": {"it": thing}})


def renamed(prefix):
    def change(content):
        return content | {"state_dict": {prefix + name: value for name, value in content["state_dict"].items()}}

    return by_hand(change=change)


def without(part):
    def change(content):
        return content | {"state_dict": {k: v for k, v in content["state_dict"].items() if part not in k}}

    def write(module, folder):
        files = by_hand(change=change)(module, folder)
        for state, _ in files.windows:  # the module's own values
            state.update({k: v for k, v in module.state_dict().items() if part in k})
        return files

    return write


def one_dot_x(content):
    """Before 1.6: callbacks by class, a Namespace, other counting of epochs."""
    older = {"pytorch-lightning_version": "1.5.10", "epoch": content["epoch"] + 1, "hparams_name": "hparams"}
    states = {ModelCheckpoint: {"best_model_path": pathlib.Path("x"), "best_model_score": torch.ones(())}}
    return content | older | {"callbacks": states, "hyper_parameters": argparse.Namespace(lr=0.1), "lr_schedulers": []}


def sharded(module, folder):
    (folder / "epoch=0.ckpt").mkdir()
    (folder / "epoch=0.ckpt" / ".metadata").write_bytes(b"")
    return Files(read(folder), [])


def two_fits(module, folder):
    files = by_hand()(module, folder)
    torch.save({"epoch": 0, "global_step": 3, "state_dict": module.state_dict()}, folder / "other.ckpt")
    return files


def repeated(module, folder):
    files = by_hand()(module, folder)
    (folder / "last.ckpt").write_bytes((folder / "7.ckpt").read_bytes())
    return files


def more_layers(content):
    extra = {"net.3.weight": torch.ones(3, 3, dtype=torch.float64), "net.3.bias": torch.ones(3, dtype=torch.float64)}
    return content | {"state_dict": OrderedDict({**content["state_dict"], **extra})}


def loose():
    module = Step(mlp())
    module.strict_loading = False
    return module


CHECKPOINTS = [
    case("a folder of .ckpt files", by_hand()),
    case("a list of .ckpt files, last first", by_hand(pick=lambda f: [f / "7.ckpt", f / "3.ckpt"])),
    case("a folder where last.ckpt repeats another file", repeated),
    case(".ckpt files with a Path in the hyper-parameters", in_hparams(pathlib.Path("/data"))),
    case(".ckpt files with a Namespace", in_hparams(argparse.Namespace(lr=0.1, root=pathlib.Path("x")))),
    case(".ckpt files with an Enum", in_hparams(Colour.RED)),
    case(".ckpt files with a dict of another class", in_hparams(Config(a=Config(b=[1])))),
    case(".ckpt files with NumPy's numbers", in_hparams([np.float64(0.5), np.arange(3)])),
    case(".ckpt files with an object of a user's class", in_hparams(Settings())),
    case(".ckpt files with functools.partial and a function", in_hparams([functools.partial(max, 1), mlp])),
    case(".ckpt files with a whole module", in_hparams(nn.Linear(2, 2))),
    case(".ckpt files with a command, which is not run", in_hparams(Hostile())),
    case("legacy .ckpt files", by_hand(zipped=False)),
    case("legacy .ckpt files with a user's class", by_hand(zipped=False, hyper_parameters=Settings())),
    case(".ckpt files of Lightning 1.5", by_hand(change=one_dot_x)),
    case("legacy .ckpt files of Lightning 1.5", by_hand(zipped=False, change=one_dot_x)),
    case("names that begin with module.", renamed("module.")),
    case("names that begin with _orig_mod.", renamed("_orig_mod.")),
    case("a frozen layer that is not in the files", without("net.0"), half_frozen),
    case("more in the files than in the module, not strict", by_hand(change=more_layers), loose),
    case("EMA: raw weights", fitted(ema, "raw")),
    case("EMA: averaged weights", fitted(ema, "averaged")),
    case("EMA: weights averaged at the end of the fit", captured("averaged", ema)),
    case("EMA with BatchNorm: raw weights", fitted(ema, "raw"), normed),
    case("EMA with BatchNorm: averaged weights", fitted(ema, "averaged"), normed),
    case("SWA: raw weights", fitted(swa, "raw")),
    case("SWA: averaged weights", fitted(swa, "averaged")),
    case("SWA: weights averaged at the end of the fit", captured("averaged", swa)),
    case("SWA with BatchNorm: raw weights", fitted(swa, "raw"), normed),
    case("SWA with BatchNorm: weights averaged at the end of the fit", captured("averaged", swa), normed),
    case("the best weights", captured("best")),
    case("weights in a file", fitted(which="path")),
    refused("averaged weights in files without", fitted(weights="averaged"), "Expected averaged weights", "torch.save"),
    refused(
        "SWA with BatchNorm: an average in a file", one_of_swa, "BatchNorm statistics", "save_checkpoint", make=normed
    ),
    refused("averaged weights of a run without", captured("averaged"), "Expected averaged weights", "weights="),
    refused("a trainable layer that is not in the files", without("net.0"), "`net.0.bias`", "requires_grad_(False)"),
    refused("more in the files than in the module", by_hand(change=more_layers), "`net.3.bias`", "strict_loading"),
    refused("a sharded checkpoint", sharded, "distributed checkpoint", "consolidate_checkpoint"),
    refused("files of two fits", two_fits, "different weights at step 3", "Pass one of them"),
]
