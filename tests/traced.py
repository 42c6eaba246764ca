"""Trajectories whose weights are known: a checkpoint written by hand, or a fit that does not move."""

import torch
from case import Step
from fits import fit
from torch.utils.data import DataLoader

from lightning_influence import Influence, Trajectory


def still(module, folder, *groups, rate=0.1, step=4):
    """One Lightning checkpoint of a module's own weights, after some steps at one learning rate."""
    rates = rate if isinstance(rate, list) else [rate] * len(groups)
    described = [{"lr": lr, "params": [0], **group} for lr, group in zip(rates, groups, strict=True)]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    content = {"state_dict": weights, "global_step": step, "epoch": 0}
    path = folder / f"{step}.ckpt"
    torch.save({**content, "optimizer_states": [{"state": {}, "param_groups": described}]}, path)
    return Trajectory.from_checkpoints([path], learning_rates=rate if not isinstance(rate, list) else [rates])


class Still(Step):
    """Plain gradient descent with weight decay."""

    def __init__(self, net, loss, decay, rate):
        super().__init__(net, loss)
        self.decay, self.rate = decay, rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, weight_decay=self.decay)

    def trained(self, data, folder, batch_size, epochs, **options):
        """The trajectory of a fit."""
        fit(self, DataLoader(data, batch_size), Influence(dirpath=folder, **options), max_epochs=epochs)
        return Trajectory.load(folder)
