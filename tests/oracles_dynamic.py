"""What replays and derivatives of whole fits must equal: every step written out by hand; nothing of the package."""

import copy

import torch
from oracles import flat
from torch.func import functional_call


def unrolled(run, w):
    """Final weights of a run as a differentiable function of the weights ``w`` of its examples.

    ``run`` has: module (a copy nobody else uses), start {name: tensor}, losses(module, params, batch) -> [batch],
    windows [[(ids, batch, rng state or None), ...], ...], rates [[lr per group], ...], groups [([names], settings)],
    kind, divisor, mean, clip (None or (algorithm, limit)), renormalize.
    """
    params = {name: value.clone().requires_grad_(True) for name, value in run.start.items()}
    memory = {name: {} for name in params}
    for window, rates in zip(run.windows, run.rates, strict=True):
        total = None
        for ids, batch, state in window:
            if state is not None:
                torch.set_rng_state(state)
            own = w[torch.as_tensor(ids)]
            losses = run.losses(run.module, params, batch)
            weighted = (own * losses).sum()
            if run.renormalize:
                weighted = weighted / own.sum()
            elif run.mean:
                weighted = weighted / len(ids)
            found = torch.autograd.grad(
                weighted / run.divisor, list(params.values()), create_graph=True, allow_unused=True
            )
            total = found if total is None else [added(a, b) for a, b in zip(total, found, strict=True)]
        reached = {name: g for name, g in zip(params, total, strict=True) if g is not None}
        gradients = clipped(reached, run.clip)
        for (names, settings), lr in zip(run.groups, rates, strict=True):
            for name in names:
                if name in gradients:  # torch does not move a parameter without a gradient
                    params[name] = hand_step(run.kind, settings, params[name], gradients[name], memory[name], lr)
    return params


def added(one, other):
    return one if other is None else other if one is None else one + other


def clipped(gradients, clip):
    if clip is None:
        return gradients
    algorithm, limit = clip
    if algorithm == "value":
        return {name: g.clamp(-limit, limit) for name, g in gradients.items()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return {name: g * (limit / (norm + 1e-6)).clamp(max=1.0) for name, g in gradients.items()}


def hand_step(kind, settings, weight, gradient, memory, lr):
    """One step of torch's optimizers, from their documentation."""
    if settings.get("maximize"):
        gradient = -gradient
    decay = settings.get("weight_decay", 0.01 if kind == "AdamW" else 0.0)
    if kind == "SGD":
        gradient = gradient + decay * weight
        momentum = settings.get("momentum", 0.0)
        if momentum:
            if "buffer" in memory:
                memory["buffer"] = momentum * memory["buffer"] + (1 - settings.get("dampening", 0.0)) * gradient
            else:
                memory["buffer"] = gradient
            gradient = gradient + momentum * memory["buffer"] if settings.get("nesterov") else memory["buffer"]
        return weight - lr * gradient
    if kind == "AdamW":
        weight = weight * (1 - lr * decay)
    else:
        gradient = gradient + decay * weight
    b1, b2 = settings.get("betas", (0.9, 0.999))
    k = memory["k"] = memory.get("k", 0) + 1
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * gradient
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * gradient**2
    root = memory["v"] / (1 - b2**k)
    # the one-sided limit where every gradient so far was zero
    root = torch.where(root > 0, root, torch.ones_like(root)).sqrt() * (root > 0)
    return weight - lr * (memory["m"] / (1 - b1**k)) / (root + settings.get("eps", 1e-8))


def influence(run, query_losses, n_train, at=None):
    """[query, train]: minus the derivative of each query's loss at the end by each example's weight, by autograd.

    ``at``: the weights, 1 where not given.
    """
    w = (torch.ones(n_train, dtype=torch.float64) if at is None else at.clone()).requires_grad_()
    params = unrolled(run, w)
    values = query_losses(run.module, params)
    return -torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in values])


def losses_at(run, query_losses, w):
    """[query]: the queries' losses at the end of the run under other weights."""
    return query_losses(run.module, unrolled(run, w)).detach()


def call(module, params, *inputs):
    return functional_call(module, params, inputs)


def rows_of(losses, params):
    """{name: [example, *shape]}: gradients of the losses, one backward pass each."""
    values = list(params.values())
    found = [torch.autograd.grad(loss, values, retain_graph=True, materialize_grads=True) for loss in losses]
    return {name: torch.stack(column) for name, column in zip(params, zip(*found, strict=True), strict=True)}


def tracin(run, quiet_losses, queries, n_train, change=lambda rows: rows):
    """[query, train], or [train] where ``queries`` is None and examples are their own: the double loop over the steps.

    Args:
        run: as ``unrolled`` takes it.
        quiet_losses: (module, params, batch) -> [batch], in eval mode.
        queries: their batch.
        n_train: training examples.
        change: what is done to gradients {name: [example, *shape]} before they are multiplied.
    """
    total = torch.zeros(n_train, dtype=torch.float64)
    if queries is not None:
        total = total.expand(len(queries[1]), -1).clone()
    module = copy.deepcopy(run.module)  # its buffers are written into
    params = {name: value.clone() for name, value in run.start.items()}
    memory = {name: {} for name in params}
    for window, rates in zip(run.windows, run.rates, strict=True):
        here = {name: value.detach().requires_grad_(True) for name, value in params.items()}
        summed, drawn = {name: torch.zeros_like(v) for name, v in here.items()}, []
        standing = [batch if queries is None else queries for _, batch, _ in window]  # before any buffer is written
        each = [change(rows_of(quiet_losses(module, here, batch), here)) for batch in standing]
        for (ids, batch, state), asked in zip(window, each, strict=True):
            if state is not None:
                torch.set_rng_state(state)
            rows = rows_of(run.losses(module, here, batch), here)
            share = 1.0 / (run.divisor * (len(ids) if run.mean else 1))
            summed = {name: summed[name] + share * rows[name].sum(0) for name in here}
            drawn.append((ids, share, asked, change(rows)))
        after = clipped(summed, run.clip)
        length = lambda named: torch.cat([v.flatten() for v in named.values()]).norm()  # noqa: E731
        factor = length(after) / length(summed) if run.clip else 1.0
        for (names, settings), lr in zip(run.groups, rates, strict=True):
            pull = lr * factor / (1.0 - settings.get("momentum", 0.0)) * (-1.0 if settings.get("maximize") else 1.0)
            for ids, share, asked, rows in drawn:
                products = sum(flat(asked[name]) @ flat(rows[name]).T for name in names)
                for k, i in enumerate(ids):
                    total[..., i] += pull * share * (products[k, k] if queries is None else products[:, k])
            for name in names:
                params[name] = hand_step(run.kind, settings, here[name], after[name], memory[name], lr).detach()
    return total
