"""The bank of retrained models: resumable, parallel, one for all that retrain."""

from lightning_influence.refit.bank import Bank
from lightning_influence.refit.models import Models
from lightning_influence.refit.refit import Refit

__all__ = ["Bank", "Models", "Refit"]
