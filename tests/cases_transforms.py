"""Steps that call ``torch.func`` transforms, and checkpointing."""

import torch
from case import Case, Step, both, mlp
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def right(name, step):
    """A case with this ``training_step``: (module, x, y) -> loss."""

    class Called(Step):
        def training_step(self, batch, batch_idx):
            return step(self, *batch)

    return Case(name, lambda: Called(mlp()), **both(5))


def penalised(per_example):
    """Cross-entropy and a penalty on something of each example's gradient."""

    def step(m, x, y):
        return F.cross_entropy(m(x), y) + 0.1 * per_example(m, x, y).square().flatten(1).sum(1).mean()

    return step


def adapted(m, x, y):
    weights = dict(m.net.named_parameters())

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(m.net, parameters, (x,)), y)

    def one(x, y):
        slopes = grad(loss)(weights, x, y)
        return loss({name: weights[name] - 0.1 * slopes[name] for name in weights}, x, y)

    return vmap(one)(x, y).mean()


def along(m, x, y):
    out, tangent = jvp(m.net, (x,), (torch.ones_like(x),))
    return F.cross_entropy(out, y) + 0.1 * tangent.square().sum(1).mean()


def pulled(m, x, y):
    out, back = vjp(m.net, x)
    return F.cross_entropy(out, y) + 0.1 * back(torch.ones_like(out))[0].square().sum(1).mean()


def class_weighted(out, y):
    return F.cross_entropy(out, y, weight=torch.tensor([0.2, 1.0, 3.0]).to(out))


TRANSFORMS = [
    right("vmap of a loss", lambda m, x, y: vmap(F.cross_entropy)(m(x), y).mean()),
    right("vmap of a loss with class weights", lambda m, x, y: vmap(class_weighted)(m(x), y).mean()),
    right("vmap of the network", lambda m, x, y: vmap(lambda x, y: F.cross_entropy(m.net(x), y))(x, y).mean()),
    right("vmap over heads", lambda m, x, y: vmap(F.cross_entropy, (0, None))(torch.stack([m(x), 2 * m(x)]), y).mean()),
    right("a penalty by grad", penalised(lambda m, x, y: vmap(grad(lambda x: m.net(x).logsumexp(0)))(x))),
    right(
        "a penalty by grad of the loss",
        penalised(lambda m, x, y: vmap(grad(lambda x, y: F.cross_entropy(m.net(x), y)))(x, y)),
    ),
    right("a penalty by jvp", along),
    right("a penalty by vjp", pulled),
    right("a step of gradient descent for each example", adapted),
    right(
        "functional_call with other weights",
        lambda m, x, y: F.cross_entropy(
            functional_call(m.net, {n: 2 * p for n, p in m.net.named_parameters()}, (x,)), y
        ),
    ),
    right("a checkpointed network", lambda m, x, y: F.cross_entropy(checkpoint(m.net, x, use_reentrant=False), y)),
    right(
        "a loss checkpointed with re-entry", lambda m, x, y: checkpoint(F.cross_entropy, m(x), y, use_reentrant=True)
    ),
]
