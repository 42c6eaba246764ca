"""A LightningModule as a function of parameters and a batch, left as it was found."""
