"""Methods on a fit with a mean over the tokens of a batch, against the joint batch's loss by its examples' weights."""

import copy
from types import SimpleNamespace

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, drawn, inputs, mlp
from fits import QUIET
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    ExactHessian,
    HyDRA,
    Influence,
    InfluenceFunction,
    LeaveOneOut,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    Trajectory,
)
from lightning_influence.replay.refit_agreement import removals

N, CLASSES, TIMES, MOMENTUM = 9, 5, 6, 0.6


class Language(pl.LightningModule):
    """Cross-entropy over all tokens of the batch that are not ignored; it notes which examples it was given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(CLASSES, 3), nn.Tanh(), nn.Linear(3, CLASSES))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.trainer.training:
            self.seen.append(index.tolist())
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=MOMENTUM, weight_decay=0.01)


def data(n, seed, empty=()):
    g = drawn(seed)
    x, y = torch.randint(CLASSES, (n, TIMES), generator=g), torch.randint(CLASSES, (n, TIMES), generator=g)
    for i in range(n):
        y[i, 1 + (i * 3 + seed) % (TIMES - 1) :] = -100
        if i in empty:
            y[i] = -100
    return Items([(x[i], y[i], i) for i in range(n)])


def fitted(folder, methods=(), empty=(), accumulate=1, epochs=2):
    torch.manual_seed(0)
    module = Language().double()
    train, start = data(N, 1, empty), copy.deepcopy(module)
    queries = data(3, 2) if methods else None
    capture = Influence(methods=methods, dirpath=folder, queries=queries, max_cost=1e6)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[capture], accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(train, 4, shuffle=True))
    attributor = Attributor(module, DataLoader(train, 4), Trajectory.load(folder))
    steps = [module.seen[k : k + accumulate] for k in range(0, len(module.seen), accumulate)]
    return SimpleNamespace(
        module=module, train=train, queries=data(3, 2), start=start, steps=steps, accumulate=accumulate,
        attributor=attributor, capture=capture,
    )  # fmt: skip


# ---- brute force ----------------------------------------------------------------------------------------------------


def of_tokens(module, params, items, weights=None):
    """The sum of weight × token losses, and the number of tokens."""
    x, y = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
    losses = F.cross_entropy(functional_call(module.net, params, (x,)).transpose(1, 2), y, reduction="none").sum(1)
    return losses if weights is None else (losses * weights).sum(), (y != -100).sum(1)


def trained(fit, w, renormalize=False):
    """The final weights as a function of the weights of the examples."""
    params = {n.removeprefix("net."): p.detach().clone().requires_grad_(True) for n, p in fit.start.named_parameters()}
    buffers = None
    for step in fit.steps:
        total = None
        for ids in step:
            items = [fit.train[i] for i in ids]
            loss, counts = of_tokens(fit.module, params, items, w[ids])
            divisor = (w[ids] * counts).sum() if renormalize else counts.sum()
            found = torch.autograd.grad(loss / divisor / fit.accumulate, list(params.values()), create_graph=True)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        total = [g + 0.01 * p for g, p in zip(total, params.values(), strict=True)]
        buffers = total if buffers is None else [MOMENTUM * b + g for b, g in zip(buffers, total, strict=True)]
        params = {name: p - 0.3 * b for (name, p), b in zip(params.items(), buffers, strict=True)}
    return params


def query_losses(fit, params):
    losses, counts = of_tokens(fit.module, params, [fit.queries[i] for i in range(3)])
    return losses / counts


def derivative(fit, renormalize=False):
    """[query, train]: minus the derivatives of the queries' losses by the weights."""
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    losses = query_losses(fit, trained(fit, w, renormalize))
    return -torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses])


def gradients(fit, items, scale=None):
    """[example, parameter]: of the mean token losses of some examples at the final weights."""
    params = {n.removeprefix("net."): p.detach().requires_grad_(True) for n, p in fit.module.named_parameters()}
    losses, counts = of_tokens(fit.module, params, items)
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    dense = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return dense / counts[:, None] if scale is None else dense / scale


def curvature(fit):
    """The Hessian of the mean over all tokens of the training set."""
    params = [p.detach() for p in fit.module.parameters()]
    names = [n.removeprefix("net.") for n, _ in fit.module.named_parameters()]
    sizes = [p.numel() for p in params]
    items = [fit.train[i] for i in range(N)]

    def loss(vector):
        parts = [v.view(p.shape) for v, p in zip(vector.split(sizes), params, strict=True)]
        losses, counts = of_tokens(fit.module, dict(zip(names, parts, strict=True)), items)
        return losses.sum() / counts.sum()

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in params]))


def tokens(fit):
    return torch.tensor([float((fit.train[i][1] != -100).sum()) for i in range(N)], dtype=torch.float64)


def close(scores, expected, tolerance=1e-10):
    oracles.assert_scores(scores.values, expected, tolerance)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("empty", [(), (4,)])
def test_hydra_is_the_derivative_by_weights_in_the_joint_batch(tmp_path, accumulate, empty):
    fit = fitted(tmp_path, empty=empty, accumulate=accumulate)
    close(fit.attributor.score(HyDRA(checks=0), fit.queries), derivative(fit))
    scores = fit.attributor.score(HyDRA(checks=0, removal="renormalize"), fit.queries)
    close(scores, derivative(fit, renormalize=True))
    if empty:
        assert "without any have no influence: [4]" in " ".join(scores.notes)


def test_hydra_during_the_fit_gives_the_same(tmp_path):
    fit = fitted(tmp_path, methods={"exact": HyDRA.during_fit(), "fast": HyDRA.during_fit(hessian=False)})
    close(fit.capture.scores["exact"], derivative(fit))
    close(fit.capture.scores["fast"], fit.attributor.score(HyDRA(hessian=False, checks=0), fit.queries).values)


def test_hydra_over_several_runs_leaves_examples_out_of_their_batches(tmp_path):
    fit = fitted(tmp_path)
    expected = torch.zeros(3, N, dtype=torch.float64)
    for weights in removals(N, 2, seed=1):
        w = weights.clone().requires_grad_(True)
        losses = query_losses(fit, trained(fit, w))
        expected -= torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses]) / 2
    close(fit.attributor.score(HyDRA(checks=0, runs=2), fit.queries), expected)


@pytest.mark.parametrize("empty", [(), (4,)])
def test_leave_one_out_repeats_the_fit_with_a_weight_of_zero(tmp_path, empty):
    fit = fitted(tmp_path / "run", empty=empty)
    attributor = Attributor(
        fit.module,
        DataLoader(fit.train, 4),
        fit.attributor.trajectory,
        refit=Refit(seeds="fixed", dirpath=tmp_path / "refit"),
    )
    scores = attributor.score(LeaveOneOut(examples=(0, 4)), fit.queries)
    before = query_losses(fit, trained(fit, torch.ones(N, dtype=torch.float64)))
    for i in (0, 4):
        w = torch.ones(N, dtype=torch.float64)
        w[i] = 0
        change = query_losses(fit, trained(fit, w)) - before
        column = scores.train_ids.tolist().index(i)
        torch.testing.assert_close(scores.values[:, column].double(), change.detach(), rtol=1e-8, atol=1e-10)


def test_tracin_and_tracin_cp_sum_over_the_steps_with_their_weights(tmp_path):
    fit = fitted(tmp_path)
    counts = tokens(fit)
    share = torch.zeros(2, N, dtype=torch.float64)
    for k, (ids,) in enumerate(fit.steps):
        share[k // 3, ids] += counts[ids] / counts[ids].sum() * 0.3 / (1 - MOMENTUM)
    expected, squares = 0.0, 0.0
    for k, checkpoint in enumerate(fit.attributor.trajectory.checkpoints[1:]):
        fit.module.load_state_dict(checkpoint.load().parameters, strict=False)
        rows = gradients(fit, [fit.train[i] for i in range(N)])
        expected += gradients(fit, [fit.queries[i] for i in range(3)]) @ rows.T * share[k]
        squares += rows.square().sum(1) * share[k]
    close(fit.attributor.score(TracInCP(), fit.queries), expected)
    oracles.assert_scores(fit.attributor.self_influence(TracInCP()).values, squares, 1e-10)


def test_tracin_at_each_step(tmp_path):
    fit = fitted(tmp_path)
    counts, expected = tokens(fit), torch.zeros(3, N, dtype=torch.float64)
    params, buffers = {n: p.detach().clone() for n, p in fit.start.named_parameters()}, None
    for (ids,) in fit.steps:
        fit.module.load_state_dict(params)
        rows = gradients(fit, [fit.train[i] for i in range(N)])
        product = gradients(fit, [fit.queries[i] for i in range(3)]) @ rows.T
        expected[:, ids] += (product * counts / counts[ids].sum())[:, ids] * 0.3 / (1 - MOMENTUM)
        step = (rows[ids] * counts[ids][:, None] / counts[ids].sum()).sum(0)
        flat = torch.cat([p.flatten() for p in params.values()])
        step = step + 0.01 * flat
        buffers = step if buffers is None else MOMENTUM * buffers + step
        parts = (flat - 0.3 * buffers).split([p.numel() for p in params.values()])
        params = {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}
    close(fit.attributor.score(TracIn(), fit.queries), expected)


# ---- influence functions --------------------------------------------------------------------------------------------


def influence(fit, damping=0.05):
    share = tokens(fit) / tokens(fit).sum()
    matrix = curvature(fit)
    matrix = matrix + (damping + 0.01) * torch.eye(len(matrix), dtype=torch.float64)
    queries = gradients(fit, [fit.queries[i] for i in range(3)])
    return torch.linalg.solve(matrix, queries.T).T @ gradients(fit, [fit.train[i] for i in range(N)]).T * share


def test_influence_functions_are_about_the_mean_over_all_tokens(tmp_path):
    fit = fitted(tmp_path, epochs=6)
    ask = fit.attributor
    exact = InfluenceFunction(ExactHessian(damping=0.05))
    close(ask.score(exact, fit.queries), influence(fit), 1e-9)
    solved = InfluenceFunction(ConjugateGradient(damping=0.05, tolerance=1e-11))
    close(
        ask.score(solved, fit.queries), ask.score(InfluenceFunction(ExactGGN(damping=0.05)), fit.queries).values, 1e-7
    )
    train = [fit.train[i] for i in range(N)]
    matrix = curvature(fit)
    inverse = torch.linalg.inv(matrix + 0.06 * torch.eye(len(matrix), dtype=torch.float64))
    rows, share = gradients(fit, train), tokens(fit) / tokens(fit).sum()
    own = (rows @ inverse * rows).sum(1) * share
    oracles.assert_scores(ask.self_influence(exact).values, own, 1e-9)
    scores = ask.score(InfluenceFunction(ExactHessian(damping=0.05), normalize="relatif"), fit.queries)
    close(scores, influence(fit) / share / (rows @ inverse).norm(dim=1), 1e-8)


def test_ekfac_weighs_the_fisher_by_tokens(tmp_path):
    fit = fitted(tmp_path, epochs=6)
    ask = fit.attributor
    rows = gradients(fit, [fit.train[i] for i in range(N)])
    share = tokens(fit) / tokens(fit).sum()
    attributor = Attributor(
        fit.module, DataLoader(fit.train, 4), ask.trajectory, parameters="net.2.bias"
    )  # a bias alone: the Fisher is dense in a basis of one side
    scores = attributor.score(InfluenceFunction(EKFAC(damping=0.05)), fit.queries)
    bias = rows[:, -CLASSES:]
    diagonal = (share[:, None] * bias.square()).sum(0) + 0.06
    queries = gradients(fit, [fit.queries[i] for i in range(3)])[:, -CLASSES:]
    close(scores, (queries / diagonal) @ bias.T * share, 1e-9)
    own = attributor.self_influence(InfluenceFunction(EKFAC(damping=0.05))).values
    oracles.assert_scores(own, (bias.square() / diagonal).sum(1) * share, 1e-9)


def test_labels_are_sampled_under_class_weights_and_weigh_by_them():
    classes = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    torch.manual_seed(0)
    module, data = Step(mlp(), nn.CrossEntropyLoss(classes)).double(), inputs(5, n=N)()
    attributor = Attributor(module, data, parameters="net.2.bias")
    scores = attributor.score(InfluenceFunction(EKFAC(damping=0.05)), inputs(5, n=3, seed=2)())
    assert "EK-FAC of the Fisher:" in " ".join(scores.notes)
    share = torch.stack([classes[y] for _, y in data]) / sum(classes[y] for _, y in data)
    rows = {}
    for name, items in (("train", data), ("queries", inputs(5, n=3, seed=2)())):
        x, y = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
        chance = module.net(x).softmax(1).detach()
        rows[name] = chance - F.one_hot(y, 3)
        if name == "train":
            fisher = (share[:, None] * chance * (1 - chance)).sum(0)
    expected = (rows["queries"] / (fisher + 0.05)) @ rows["train"].T * share
    close(scores, expected, 1e-9)


def test_groups_to_second_order_weigh_by_tokens(tmp_path):
    fit = fitted(tmp_path, epochs=6)
    ids, share = [1, 4, 6], tokens(fit) / tokens(fit).sum()
    method = InfluenceFunction(ExactHessian(damping=0.05))
    found = fit.attributor.group(method, ids, fit.queries)
    matrix = curvature(fit)
    inverse = torch.linalg.inv(matrix + 0.06 * torch.eye(len(matrix), dtype=torch.float64))
    rows = gradients(fit, [fit.train[i] for i in range(N)])
    first = inverse @ (rows[ids].T @ share[ids])
    params = {n.removeprefix("net."): p.detach() for n, p in fit.module.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def part(vector):
        parts = dict(zip(params, (v.view(p.shape) for v, p in zip(vector.split(sizes), params.values())), strict=True))
        losses, _ = of_tokens(fit.module, parts, [fit.train[i] for i in ids])
        return losses.sum() / tokens(fit).sum()

    own = torch.autograd.functional.hessian(part, torch.cat([p.flatten() for p in params.values()]))
    change = first + inverse @ own @ first
    expected = gradients(fit, [fit.queries[i] for i in range(3)]) @ change
    torch.testing.assert_close(found.double(), expected, rtol=1e-8, atol=1e-12)


def test_source_weighs_training_examples_by_tokens(tmp_path):
    fit = fitted(tmp_path, epochs=1)
    reach = 3 * 0.3 / (1 - MOMENTUM)  # three steps to the only checkpoint after the initial weights
    matrix = curvature(fit) + 0.01 * torch.eye(len(curvature(fit)), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    moved = vectors @ torch.diag((1 - torch.exp(-reach * values)) / values) @ vectors.T
    queries, train = (gradients(fit, [of[i] for i in range(n)]) for of, n in ((fit.queries, 3), (fit.train, N)))
    expected = queries @ moved @ train.T * tokens(fit) / tokens(fit).sum()
    close(fit.attributor.score(SOURCE(segments=1, curvature=ExactHessian()), fit.queries), expected, 1e-8)


def test_representer_points_are_refused(tmp_path):
    fit = fitted(tmp_path)
    with pytest.raises(ValueError, match="same weight in the loss"):
        fit.attributor.score(RepresenterPoints(), fit.queries)


def test_a_query_without_tokens_is_refused_and_scores_do_not_depend_on_blocks(tmp_path):
    fit = fitted(tmp_path, empty=(4,))
    with pytest.raises(ValueError, match="quer"):
        fit.attributor.score(TracInCP(), data(3, 2, empty=(1,)))
    by_one = Attributor(fit.module, DataLoader(fit.train, 4), fit.attributor.trajectory, batch_size=1)
    close(by_one.score(TracInCP(), fit.queries), fit.attributor.score(TracInCP(), fit.queries).values)
