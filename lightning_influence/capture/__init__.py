"""The guest in the Trainer: example identity, steps and learning rates, checkpoints, and how they reach the disk."""
