"""What the package's numbers must equal: loops, one backward pass an example, dense algebra; nothing of the package."""

import copy
import inspect
import random

import numpy as np
import torch

# ---- per-sample gradients -----------------------------------------------------------------------------------------


def quiet_copy(module, state=None):
    """A deep copy in eval mode that logs nowhere, at other weights if given.

    Metrics and the Trainer stay what they are: the copy is thrown away, the Trainer is only read.
    """
    module = getattr(module, "_orig_mod", module)
    trainer = module.__dict__.get("_trainer")
    computed = [
        (part, key, value)
        for part in module.modules()
        for key, value in part.__dict__.items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    module.__dict__["_trainer"] = None
    for part, key, value in computed:  # what a forward pass left behind cannot be copied, and is made again
        part.__dict__[key] = value.detach()
    try:
        twin = copy.deepcopy(module)
    finally:
        module.__dict__["_trainer"] = trainer
        for part, key, value in computed:
            part.__dict__[key] = value
    if state is not None:
        own = {clean(name): tensor for name, tensor in (*twin.named_parameters(), *twin.named_buffers())}
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
    twin.__dict__["_trainer"] = trainer
    for name in ("log", "log_dict", "print"):
        twin.__dict__[name] = lambda *args, **kwargs: None
    return twin.eval()


def clean(name):
    return name.replace("_orig_mod.", "")


def rows(module, ones, names, loss=None, state=None, indices=None):
    """{name: [example, *shape]}: gradients of the losses of batches of one, each on a fresh copy of the module.

    ``indices``: the ``batch_idx`` of each; None: 0.
    """
    found = {name: [] for name in names}
    for one, index in zip(ones, indices or [0] * len(ones), strict=True):
        twin = quiet_copy(module, state)
        parameters = {clean(name): p for name, p in twin.named_parameters()}
        for p in parameters.values():
            p.requires_grad_(True)
        with rng_isolated(), torch.enable_grad():
            value = one_loss(twin, one, loss, index)
            value.backward()
        for name in names:
            gradient = parameters[name].grad
            found[name].append(torch.zeros_like(parameters[name]) if gradient is None else gradient.detach().to_dense())
    return {name: torch.stack(of_name) for name, of_name in found.items()}


def one_loss(module, one, loss=None, index=0):
    """The loss of a batch of one: the step's, or that of a callable that gives per-sample losses."""
    one = copy.deepcopy(one)
    one = module.on_after_batch_transfer(module.on_before_batch_transfer(one, 0), 0)
    if loss is not None:
        return loss(module, one).sum()
    context = getattr(module, "_compiler_ctx", None)
    step = type(module).training_step.__get__(module) if context else module.training_step
    takes_index = step.__code__.co_argcount > 2 or step.__code__.co_flags & inspect.CO_VARARGS
    if module._trainer is not None:
        module._trainer.fit_loop.epoch_loop.batch_progress.current.ready = index + 1
    value = step(one, index) if takes_index else step(one)
    return value["loss"] if isinstance(value, dict) else value


class rng_isolated:
    def __enter__(self):
        self.states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def __exit__(self, *_):
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])
        np.random.set_state(self.states[2])


# ---- methods ------------------------------------------------------------------------------------------------------


def inner(left, right, weight=None, groups=None):
    """[query, train] in float64: the sum over parameters; ``weight`` [group, train] multiplies the columns."""
    total = 0.0
    for name in left:
        product = flat(left[name]) @ flat(right[name]).T
        factor = 1.0 if weight is None else weight[0 if groups is None else groups[name]].double()
        total = total + product * factor
    return total


def flat(rows):
    return rows.double().reshape(len(rows), -1)


def squared(gradients, weight=None, groups=None):
    """[train]: squared lengths, weighted as ``inner`` is."""
    return inner(gradients, gradients, weight, groups).diagonal()


def mean_of(gradients):
    return {name: value.double().mean(0, keepdim=True) for name, value in gradients.items()}


def unit(gradients, layerwise=False):
    """Each example at length one, whole or within each module's own parameters."""
    layer = {name: name.rpartition(".")[0] if layerwise else "" for name in gradients}
    length = {}
    for name, value in gradients.items():
        length[layer[name]] = length.get(layer[name], 0.0) + flat(value).square().sum(1)
    found = {}
    for name, value in gradients.items():
        size = length[layer[name]].sqrt()
        size = torch.where(size > 0, size, torch.inf)
        found[name] = value.double() / size.view(-1, *[1] * (value.ndim - 1))
    return found


def tracin(
    module,
    train,
    queries,
    names,
    windows,
    loss=None,
    groups=None,
    change=lambda gradients: gradients,
    mean=False,
    indices=None,
):
    """The double loop: ``windows`` is a list of (weights, coefficient [group, train]); ``mean``: all queries as one.

    ``indices``: the ``batch_idx`` of each training example; a query's is 0.
    """
    total = 0.0
    for state, coefficient in windows:
        left = change(rows(module, queries, names, loss, state))
        right = change(rows(module, train, names, loss, state, indices))
        total = total + inner(mean_of(left) if mean else left, right, coefficient, groups)
    return total


def tracin_self(module, train, names, windows, loss=None, groups=None, indices=None):
    return sum(squared(rows(module, train, names, loss, state, indices), c, groups) for state, c in windows)


# ---- comparison: each raises ----------------------------------------------------------------------------------------


def assert_scores(actual, expected, tolerance):
    """Errors relative to the largest score of each query (row); of all for a vector."""
    expected = torch.as_tensor(expected).double()
    actual = actual.double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert bool(expected.isfinite().all()), "the oracle itself is not finite"
    size = expected.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    torch.testing.assert_close(actual / size, expected / size, rtol=0.0, atol=tolerance)


def assert_gradients(actual, expected, tolerance):
    """Of named gradients, relative to the largest entry of all of one example's."""
    assert actual.keys() == expected.keys()
    size = torch.stack([flat(value).abs().amax(1) for value in expected.values()]).amax(0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    for name, value in expected.items():
        each = size.view(-1, *[1] * (value.ndim - 1))
        torch.testing.assert_close(
            actual[name].double() / each,
            value.double() / each,
            rtol=0.0,
            atol=tolerance,
            msg=name,
        )
