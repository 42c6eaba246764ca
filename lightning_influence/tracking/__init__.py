"""Trackers: they follow a fit step by step for methods that need it, and write what they find to disk."""

from lightning_influence.tracking.micro_batch import TrackedMicroBatch
from lightning_influence.tracking.record import load_record, record_name
from lightning_influence.tracking.tracker import (
    PlanError,
    TrackedFit,
    TrackedStep,
    Tracker,
    TrackingPlan,
    Untrackable,
    WeightUpdate,
)

__all__ = [
    "PlanError",
    "TrackedFit",
    "TrackedMicroBatch",
    "TrackedStep",
    "Tracker",
    "TrackingPlan",
    "Untrackable",
    "WeightUpdate",
    "load_record",
    "record_name",
]
