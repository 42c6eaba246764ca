"""What a method works with: the training examples, the queries, and the module at its checkpoints."""

from lightning_influence.setting.setting import Queries, Setting, Stage

__all__ = ["Queries", "Setting", "Stage"]
