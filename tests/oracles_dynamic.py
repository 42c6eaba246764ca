"""What replays and derivatives of whole fits must equal: every step written out by hand; nothing of the package."""

import torch
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
            found = torch.autograd.grad(weighted / run.divisor, list(params.values()), create_graph=True)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        gradients = clipped(dict(zip(params, total, strict=True)), run.clip)
        for (names, settings), lr in zip(run.groups, rates, strict=True):
            for name in names:
                params[name] = hand_step(run.kind, settings, params[name], gradients[name], memory[name], lr)
    return params


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


def influence(run, query_losses, n_train):
    """[query, train]: minus the derivative of each query's loss at the end by each example's weight, by autograd."""
    w = torch.ones(n_train, dtype=torch.float64, requires_grad=True)
    params = unrolled(run, w)
    values = query_losses(run.module, params)
    return -torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in values])


def losses_at(run, query_losses, w):
    """[query]: the queries' losses at the end of the run under other weights."""
    return query_losses(run.module, unrolled(run, w)).detach()


def call(module, params, *inputs):
    return functional_call(module, params, inputs)
