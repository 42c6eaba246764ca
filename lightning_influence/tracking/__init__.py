"""What watches a fit while it runs, for methods that must see it, and what that leaves on disk."""

from lightning_influence.tracking.present import Present
from lightning_influence.tracking.record import load_record, record_name
from lightning_influence.tracking.tracker import Fit, Moved, Plan, PlanError, Step, Tracker, Untrackable

__all__ = [
    "Fit",
    "Moved",
    "Plan",
    "PlanError",
    "Present",
    "Step",
    "Tracker",
    "Untrackable",
    "load_record",
    "record_name",
]
