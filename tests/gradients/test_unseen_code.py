"""Code that torch's function modes do not see: scripted and traced modules, and losses whose digits are not kept."""

import pytest
import torch
from case import Step, both, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def scripted(net):
    return torch.jit.script(net)


def traced(net):
    return torch.jit.trace(net, torch.randn(2, 5, dtype=torch.float64))


def gradients(module, data):
    found = []
    for x, y in data:
        grads = torch.autograd.grad(
            F.cross_entropy(module(x[None]), torch.as_tensor(y)[None]), list(module.parameters())
        )
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


@pytest.mark.parametrize("made", [scripted, traced])
def test_networks(made):
    data = both(5)
    train, queries = data["train"](), data["queries"]()
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    module = Step(made(net))
    scores = Attributor(module, DataLoader(train, 3)).score(GradientDot(), queries)
    torch.testing.assert_close(scores.values, gradients(module, queries) @ gradients(module, train).T)


def cross_entropy(out, y):
    return F.cross_entropy(out, y.long())


def log_of_softmax(out, y):
    return -out.softmax(1).log().gather(1, y[:, None]).mean()


class Repeated(Step):
    """Uses a layer as often as the batch says, and a sigmoid between."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        for _ in range(2):
            x = F.linear(x, self.net[0].weight.T @ self.net[0].weight).sigmoid()
            x = F.linear(x, self.net[0].weight[:, :5]) @ self.net[0].weight
        return self.loss(self.net(x), y)


def softmax(out: torch.Tensor) -> torch.Tensor:
    return out.softmax(1)


def log_of_scripted_softmax(out, y):
    return -torch.jit.script(softmax)(out).log().gather(1, y[:, None]).mean()


class Adapted(Step):
    """One step along the gradient of each example's own loss, as in meta-learning."""

    def training_step(self, batch, batch_idx):
        weights = dict(self.net.named_parameters())

        def one(x, y):
            def loss(of):
                return self.loss(torch.func.functional_call(self.net, of, (x[None],)), y[None])

            slopes = torch.func.grad(loss)(weights)
            return loss({name: weight - 0.1 * slopes[name] for name, weight in weights.items()})

        return torch.func.vmap(one)(*batch).mean()


class Unrolled(Step):
    """A loss after each use of the same layers, whose gradients stay exact."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x), y) + self.loss(self.net(x + 1.0), y)


def notes(module, dtype=torch.float32):
    module = module.to(dtype)
    train = [(x.to(dtype), y) for x, y in both(5)["train"]().items]
    found = Attributor(module, DataLoader(train, 3)).score(GradientDot(), train[:2]).notes
    return [note for note in found if "lost their digits" in note]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Step(mlp(), torch.jit.script(cross_entropy)), "TorchScript"),
        (lambda: Step(mlp(), torch.jit.script(log_of_softmax)), "TorchScript"),
        (lambda: Step(mlp(), log_of_scripted_softmax), "TorchScript"),
        (lambda: Repeated(mlp(), log_of_softmax), "another number of times"),
        (lambda: Adapted(mlp(), cross_entropy), "`cross_entropy` before a step of its own along the gradient"),
    ],
)
def test_losses_that_may_lose_digits_are_noted(make, says):
    (note,) = notes(make())
    assert says in note
    assert notes(make(), torch.float64) == []


@pytest.mark.parametrize("loss", [cross_entropy, log_of_softmax])
def test_losses_in_python_are_not(loss):
    assert notes(Step(mlp(), loss)) == []
    assert notes(Step(scripted(mlp()), loss)) == []
    assert notes(Unrolled(mlp(), cross_entropy)) == []
