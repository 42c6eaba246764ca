"""Figures of examples and their influence. matplotlib is imported when one is drawn, and no window opens."""

from lightning_influence.plotting.cell import Drawing, Item, Render
from lightning_influence.plotting.distributions import by_class, self_influence
from lightning_influence.plotting.explanation import Case, examples, explanation, explanations

__all__ = ["Case", "Drawing", "Item", "Render", "by_class", "examples", "explanation", "explanations", "self_influence"]
