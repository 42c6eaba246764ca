"""What EK-FAC must equal: factors gathered by module hooks from one backward pass an example, dense algebra."""

import torch
from torch import nn
from torch.nn import functional as F


def layers(module, ones, loss):
    """{layer name: [example] of (inputs [position, in + 1], output gradients [position, out])}, of all uses."""
    kinds = {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    found = {name: [] for name in kinds}
    for one in ones:
        calls = []
        handles = [
            layer.register_forward_hook(
                lambda layer, args, output, name=name: calls.append((name, layer, args[0], output))
            )
            for name, layer in kinds.items()
        ]
        value = loss(module, one)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(value, [output for *_, output in calls])
        seen = {}
        for (name, layer, given, _), gradient in zip(calls, gradients, strict=True):
            seen.setdefault(name, []).append(sides(layer, given.detach(), gradient))
        for name, parts in seen.items():
            found[name].append(tuple(torch.cat(of_side) for of_side in zip(*parts, strict=True)))
    return found


def sides(layer, given, gradient):
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        outputs = gradient[0].flatten(1).T
    else:
        patches, outputs = given.reshape(-1, given.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if layer.bias is not None:
        patches = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    return patches, outputs


def matrices(of_layer):
    """[example, out, in + 1]."""
    return torch.stack([s.T @ a for a, s in of_layer])


def factors(of_layer, draws=1):
    """Bases of both sides, eigenvalues measured in them, and those of K-FAC; ``draws`` gradients are one example."""
    examples = len(of_layer) / draws
    inputs = torch.cat([a for a, _ in of_layer])
    outputs = torch.cat([s for _, s in of_layer])
    values_in, basis_in = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    values_out, basis_out = torch.linalg.eigh(outputs.T @ outputs / examples)
    measured = sum((basis_out.T @ g @ basis_in) ** 2 for g in matrices(of_layer)) / examples
    return basis_out, basis_in, measured, torch.outer(values_out, values_in)


def dense_fisher(basis_out, basis_in, eigenvalues):
    """[out x in, out x in]."""
    basis = torch.kron(basis_out, basis_in)
    return basis @ torch.diag(eigenvalues.flatten()) @ basis.T


def score(fisher_layers, train, queries, damping, corrected=True, draws=1):
    """[query, train]: over n, the sum over layers; the inverse of each layer's dense Fisher."""
    total = 0.0
    for name, of_layer in train.items():
        basis_out, basis_in, measured, products = factors(fisher_layers[name], draws)
        fisher = dense_fisher(basis_out, basis_in, measured if corrected else products)
        left, right = matrices(queries[name]).flatten(1), matrices(of_layer).flatten(1)
        total = total + left @ torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).to(fisher), right.T)
    return total / len(next(iter(train.values())))
