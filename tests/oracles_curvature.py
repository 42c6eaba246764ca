"""What curvatures must equal: dense matrices by loops over examples and parameters; nothing of the package."""

import torch
from oracles import clean, flat, one_loss, quiet_copy, rng_isolated, rows


def joined(gradients):
    """[example, entries] float64, the parameters one behind the other in the order of the dict."""
    return torch.cat([flat(rows) for rows in gradients.values()], 1)


def gradients(module, ones, names, loss=None, state=None):
    return joined(rows(module, ones, names, loss, state))


def hessian(module, ones, names, loss=None, state=None):
    """The mean over examples, row by row."""
    twin, parameters = prepared(module, names, state)
    total = 0.0
    for one in ones:
        with rng_isolated(), torch.enable_grad():
            found = torch.autograd.grad(one_loss(twin, one, loss), parameters, create_graph=True, allow_unused=True)
        entries = [e for g, p in zip(found, parameters, strict=True) for e in filled(g, p).flatten()]
        lines = []
        for entry in entries:
            if not entry.requires_grad:
                lines.append(torch.zeros(len(entries), dtype=torch.float64))
                continue
            second = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            lines.append(torch.cat([filled(s, p).flatten() for s, p in zip(second, parameters, strict=True)]))
        total = total + torch.stack(lines)
    return total.detach() / len(ones)


def each_ggn(module, ones, names, outputs, bend, state=None):
    """[example, entries, entries]: J^T S J of each, ``outputs(module, one)`` [class] and ``bend(z, one)`` its S."""
    twin, parameters = prepared(module, names, state)
    found = []
    for one in ones:
        with rng_isolated(), torch.enable_grad():
            z = outputs(twin, one).flatten()
            lines = [torch.autograd.grad(c, parameters, retain_graph=True, allow_unused=True) for c in z]
        jacobian = torch.stack(
            [torch.cat([filled(g, p).flatten() for g, p in zip(of, parameters, strict=True)]) for of in lines]
        )
        found.append(jacobian.T @ bend(z.detach(), one) @ jacobian)
    return torch.stack(found)


def softmax_bend(z, one=None):
    p = z.softmax(0)
    return p.diag() - torch.outer(p, p)


def sigmoid_bend(z, one=None):
    p = z.sigmoid()
    return (p * (1 - p)).diag()


def square_bend(z, one=None):
    """Of the mean over outputs of squared errors."""
    return 2 * torch.eye(len(z), dtype=z.dtype) / len(z)


def influence(queries, curvature, diagonal, train):
    """[query, train] from rows of gradients."""
    inverse = torch.linalg.inv(curvature + diagonal * torch.eye(len(curvature), dtype=torch.float64))
    return queries @ inverse @ train.T / len(train)


def newton_step(train, curvature, each, decay, damping, weights, renormalize=False):
    """[train, entries]: the change of weights when one example leaves, one dense solve each."""
    n, eye = len(train), torch.eye(len(curvature), dtype=torch.float64)
    steps = []
    for gradient, own in zip(train, each, strict=True):
        matrix = n * (curvature + (decay + damping) * eye) - own
        shift = 1.0 if renormalize else 0.0
        steps.append(torch.linalg.solve(matrix - shift * decay * eye, gradient + shift * decay * weights))
    return torch.stack(steps)


def minimise(gradient, hessian, start, fixed=False, steps=100):
    """Newton's method on a convex function of one flat vector; raises where it does not arrive.

    With ``fixed``, ``hessian`` is the Cholesky factor of one that is close enough for all steps.
    """
    w = start.clone().double()
    for _ in range(steps):
        slope = gradient(w)
        if float(slope.abs().max()) < 1e-12:
            break
        factor = hessian if fixed else torch.linalg.cholesky(hessian(w))
        w = w - torch.cholesky_solve(slope[:, None], factor)[:, 0]
    assert float(gradient(w).abs().max()) < 1e-11
    return w


def prepared(module, names, state):
    twin = quiet_copy(module, state)
    named = {clean(name): p for name, p in twin.named_parameters()}
    for p in named.values():
        p.requires_grad_(True)
    return twin, [named[name] for name in names]


def filled(gradient, parameter):
    return torch.zeros_like(parameter) if gradient is None else gradient


def source(queries, segments):
    """[query, train]: Bae et al. (2024), by matrix exponentials; segments are (curvature, reach, gradients)."""
    total, carried = 0.0, queries
    for curvature, reach, train in reversed(segments):
        kept = torch.linalg.matrix_exp(-reach * curvature)
        moved = torch.linalg.solve(curvature, torch.eye(len(kept), dtype=kept.dtype) - kept)
        total = total + carried @ moved @ train.T / len(train)
        carried = carried @ kept
    return total


def preconditioned_source(queries, segments):
    """[query, train]: SOURCE where steps are w - pace * (C w + g) - shrunk * w, entry by entry, by matrix exponentials.

    Segments are (curvature, pace, shrunk, gradients); pace and shrunk [entries] hold the sum of the learning rates.
    """
    total, carried = 0.0, queries
    for curvature, pace, shrunk, train in reversed(segments):
        rate = torch.diag(pace) @ curvature + torch.diag(shrunk)
        size = len(rate)
        both = torch.linalg.matrix_exp(
            torch.cat([torch.cat([-rate, torch.diag(pace)], 1), rate.new_zeros(size, 2 * size)])
        )
        kept, moved = both[:size, :size], both[:size, size:]  # the integral of what is kept, without an inverse
        total = total + carried @ moved @ train.T / len(train)
        carried = carried @ kept
    return total


def walked_source(queries, segments, steps):
    """The same by walking: each example's gradient pushes the weights in every one of many small steps."""
    changes = torch.zeros_like(segments[0][3]).T
    for curvature, pace, shrunk, train in segments:
        for _ in range(steps):
            pushed = pace[:, None] * (curvature @ changes + train.T / len(train)) + shrunk[:, None] * changes
            changes = changes - pushed / steps
    return -queries @ changes
