"""Algorithms on tensors alone: they need no model, no data and no Trainer."""
