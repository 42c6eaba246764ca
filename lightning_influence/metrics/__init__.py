"""Metrics of how good estimates of influence are, as `torchmetrics.Metric`s.

Each `compute` returns a dict of float64 scalars, so that `self.log_dict(metric.compute())` works; what is undefined is
NaN.
"""

from lightning_influence.metrics.comparison import Comparison, Difference, Evaluation
from lightning_influence.metrics.evaluate import evaluate, subset_removal
from lightning_influence.metrics.leave_one_out import LeaveOneOutCorrelation
from lightning_influence.metrics.linear_datamodeling import LinearDatamodelingScore
from lightning_influence.metrics.mislabel import MislabelDetection
from lightning_influence.metrics.subset_removal import SubsetRemoval

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "SubsetRemoval",
    "evaluate",
    "subset_removal",
]
