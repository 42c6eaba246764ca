"""Retrains models on subsets of the data: resumable, in parallel, shared by all methods that need them."""

from lightning_influence.refit.bank import Bank
from lightning_influence.refit.refit import Refit

__all__ = ["Bank", "Refit"]
