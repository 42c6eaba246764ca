"""What a user asked of a fit, as its parts need it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.methods.method import Method
from lightning_influence.module.task import Loss


@dataclass(frozen=True)
class ScoringPlan:
    """What to score when a fit ends, and what to track for that while it runs.

    The arguments of `Influence` of the same names, after they were checked.
    """

    methods: Mapping[str, Method]
    queries: Any
    parameters: Sequence[str] | None
    loss: Loss | None
    top_k: int | None
    self_influence: bool
    max_cost: float
    log_scores: bool
