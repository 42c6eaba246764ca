"""A LightningModule as a function of its parameters and a batch, restored to its former state afterwards."""
