"""A method of your own in one file: a frozen dataclass of one of the kinds, passed as an instance, nothing to register.

Plain inner products favour training examples with large gradients: odd ones and wrong labels come first for every
query. `UnitStep` asks what one step of fixed length along an example's gradient would do to the query instead.

    python examples/your_own_method.py
"""

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import GradientDot, GradientProduct, Influence
from lightning_influence.conformance import check_method
from lightning_influence.gradients import Gradients

N_TRAIN = 1000


@dataclass(frozen=True)
class UnitStep(GradientProduct):
    r"""How much the query's loss would fall along a step of length one that lowers a training example's loss.

    .. math:: s(q, z) = \nabla\ell(w, q) \cdot \nabla\ell(w, z) / \lVert \nabla\ell(w, z) \rVert

    Needs: the final weights. Units: query loss per unit of length in weight space. Cost: one backward pass per example.
    """

    smallest: float = 1e-12
    """Gradients shorter than this have no direction."""

    def product(self, stage, query, block) -> Tensor:
        return query.dot(block.gradients) / self._length(block.gradients)

    def product_with_itself(self, stage, block) -> Tensor:
        return block.gradients.norm2() / self._length(block.gradients)

    def unit(self, setting) -> str:
        return "loss per unit of length in weight space"

    def _length(self, gradients: Gradients) -> Tensor:
        return gradients.norm2().sqrt().clamp(min=self.smallest)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def noisy_digits():
    """Training data with a tenth of the labels flipped, clean queries, and which ones were flipped."""
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    flipped = torch.randperm(N_TRAIN)[: N_TRAIN // 10]
    labels[flipped] = (labels[flipped] + torch.randint(1, 10, flipped.shape)) % 10
    train = TensorDataset(images[:N_TRAIN], labels[:N_TRAIN])
    return train, TensorDataset(images[N_TRAIN : N_TRAIN + 200], labels[N_TRAIN : N_TRAIN + 200]), flipped


def main():
    check_method(UnitStep())  # raises and names the promise that a method breaks
    print("UnitStep keeps every promise of a method.\n")

    pl.seed_everything(0, verbose=False)
    train, queries, flipped = noisy_digits()
    influence = Influence([UnitStep(), GradientDot()], queries=queries, dirpath="your_own_method_output")
    trainer = pl.Trainer(max_epochs=5, callbacks=[influence], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DataLoader(train, batch_size=32, shuffle=True))

    shares = {}
    for name, scores in influence.scores.items():
        shares[name] = torch.isin(scores.proponents(k=5).train_ids, flipped).double().mean().item()
        print(f"{name:12} {shares[name]:4.0%} of the five strongest proponents of a query have a flipped label")
    assert shares["UnitStep"] < 0.5 * shares["GradientDot"], "a step of fixed length should not favour wrong labels"


if __name__ == "__main__":
    main()
