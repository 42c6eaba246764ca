"""What a method sees of a question: training examples, queries, and the module at stages of training."""

from lightning_influence.setting.setting import Queries, Setting, Stage

__all__ = ["Queries", "Setting", "Stage"]
