"""Records a fit without changing it: examples of each batch, optimizer steps and checkpoints, written to disk."""
