"""What representer points must equal: a dense solve of the head by autograd's own Hessian, and loops over examples."""

import torch


def with_one(features, bias):
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1) if bias else features


def objective(loss, weight, features, targets, weight_decay):
    """The mean of per-sample losses of pre-activations, and torch's weight decay on the weight, bias included."""
    return loss(features @ weight.T, targets).mean() + weight_decay / 2 * weight.square().sum()


def minimum(loss, weight, features, targets, weight_decay):
    """Full Newton steps with the dense Hessian: the start is near and the objective is strictly convex."""
    shape = weight.shape

    def value(flat):
        return objective(loss, flat.view(shape), features, targets, weight_decay)

    flat = weight.detach().clone().flatten()
    for _ in range(60):
        gradient = torch.autograd.functional.jacobian(value, flat)
        if float(gradient.norm()) < 1e-14:
            break
        hessian = torch.autograd.functional.hessian(value, flat)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while float(value(flat - size * step)) > float(value(flat)) + 1e-14 and size > 1e-6:
            size /= 2
        flat = flat - size * step
    return flat.view(shape)


def gradients(loss, weight, features, targets):
    """[example, class]: of each example's loss by its pre-activations, one at a time."""
    rows = []
    for i in range(len(features)):
        z = (features[i : i + 1] @ weight.T).detach().requires_grad_()
        rows.append(torch.autograd.grad(loss(z, targets[i : i + 1]).sum(), z)[0][0])
    return torch.stack(rows)


def alphas(loss, weight, features, targets, yeh):
    """Yeh et al., for the penalty ``yeh`` × |W|²: -1 / (2 yeh n) × the gradient by the pre-activation."""
    return -gradients(loss, weight, features, targets) / (2 * yeh * len(features))


def terms(alpha, features, asked, c):
    """[query, train]: what every training example adds to pre-activation c of every query."""
    return torch.stack([torch.stack([alpha[i, c] * (features[i] @ q) for i in range(len(features))]) for q in asked])


def on_loss(alpha, features, asked, asked_gradients):
    """[query, train]: the first-order rise of the query's loss when the example's term is taken out."""
    classes = range(alpha.shape[1])
    return -sum(asked_gradients[:, c : c + 1] * terms(alpha, features, asked, c) for c in classes)
