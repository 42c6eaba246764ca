"""The fast approximation of a fit's derivatives, and loss changes step by step, written out; nothing of the package."""

import torch
from oracles_dynamic import clipped, hand_step


def fast_influence(run, query_losses, n_train):
    """[query, train]: as `oracles_dynamic.influence`, but no gradient feels that the weights before it have changed."""
    w = torch.ones(n_train, dtype=torch.float64, requires_grad=True)
    params = {name: value.clone() for name, value in run.start.items()}
    memory = {name: {} for name in params}
    for window, rates in zip(run.windows, run.rates, strict=True):
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        for ids, batch, state in window:
            if state is not None:
                torch.set_rng_state(state)
            here = {name: value.detach().requires_grad_(True) for name, value in params.items()}
            losses = run.losses(run.module, here, batch)
            for i, loss in zip(ids, losses, strict=True):
                share = w[i] / (run.divisor * (len(ids) if run.mean else 1))
                found = torch.autograd.grad(loss, list(here.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(here, found, strict=True):
                    if gradient is not None:
                        total[name] = total[name] + share * gradient
        gradients = clipped(total, run.clip)
        for (names, settings), lr in zip(run.groups, rates, strict=True):
            for name in names:
                params[name] = hand_step(run.kind, settings, params[name], gradients[name], memory[name], lr)
    # the losses at the end are taken at the weights that the fit had, which these are where w is 1
    values = query_losses(run.module, params)
    return -torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in values])
