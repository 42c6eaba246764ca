"""One `Callback` base class for both Lightning packages, ``pytorch_lightning`` and ``lightning.pytorch``."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning_utilities.core import rank_zero


def _installed() -> list[ModuleType]:
    found = []
    # Each package replaces the logger that both share when it is imported: the user's own package keeps it.
    logger = rank_zero.log if {"pytorch_lightning", "lightning.pytorch"} & sys.modules.keys() else None
    for name in ("pytorch_lightning", "lightning.pytorch"):
        try:
            found.append(import_module(name))
        except ModuleNotFoundError:
            continue
        logger = logger or rank_zero.log
    rank_zero.log = logger or rank_zero.log
    if not found:
        raise ModuleNotFoundError("Expected `pytorch-lightning` or `lightning` to be installed, got neither.")
    return found


_packages = _installed()

Trainer: Any = _packages[0].Trainer
LightningModule: Any = _packages[0].LightningModule

# A Trainer accepts callbacks of its own package only (LightningCLI, `Trainer(callbacks=one)`, lightning < 2.6 always).
CallbackBase: Any = type("CallbackBase", tuple(dict.fromkeys(p.Callback for p in _packages)), {})

_errors = dict.fromkeys(
    import_module(f"{p.__name__}.utilities.exceptions").MisconfigurationException for p in _packages
)
MisconfigurationException: Any = type("MisconfigurationException", tuple(_errors), {"__module__": __name__})

rank_zero_info, rank_zero_warn = rank_zero.rank_zero_info, rank_zero.rank_zero_warn
