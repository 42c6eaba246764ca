"""Update rules against torch.optim and against automatic differentiation of whole runs of it, in float64."""

import pytest
import torch

from lightning_influence.numerics.clipping import ByNorm, ByValue
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule, add_rule, rule_for, update_step
from lightning_influence.numerics.optimizers.adam import Adam
from lightning_influence.numerics.optimizers.sgd import SGD

CASES = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    ("Adam", {"weight_decay": 0.1, "eps": 1e-3, "maximize": True}),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1, "eps": 1e-30, "betas": (0.7, 0.9)}),
]
RATES = (0.1, 0.05, 0.07, 0.02)


def options_of(kind, settings, lr):
    group = dict(getattr(torch.optim, kind)([torch.zeros(1)], lr=lr, **settings).param_groups[0])
    return {key: value for key, value in group.items() if key != "params"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1e-300))


def unrolled(kind, settings, start, gradients):
    """The weight after steps of an optimizer, each written out from its documentation in operations on scalars."""
    o = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    o.update({"weight_decay": 0.01} if kind == "AdamW" else {}, **settings)
    w, buf, m, v = start, None, 0.0, 0.0
    for k, (lr, given) in enumerate(zip(RATES, gradients, strict=True), start=1):
        g = -given if o.get("maximize") else given
        if kind == "SGD":
            d = g + o["weight_decay"] * w
            if o["momentum"]:
                buf = d if buf is None else o["momentum"] * buf + (1 - o["dampening"]) * d
                d = d + o["momentum"] * buf if o["nesterov"] else buf
            w = w - lr * d
            continue
        if kind == "AdamW" or o.get("decoupled_weight_decay"):
            w = w - lr * o["weight_decay"] * w
        else:
            g = g + o["weight_decay"] * w
        b1, b2 = o["betas"]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + o["eps"])
    return w


def walked(kind, settings, start, gradients):
    """The same by the rule: every place before a step, and the weight after the last."""
    rule, weight, state, places = rule_for(kind), start, {}, []
    for count, (lr, gradient) in enumerate(zip(RATES, gradients, strict=True)):
        places.append(UpdateInput(weight, gradient, state, count, options_of(kind, settings, lr)))
        weight, state = rule.step(places[-1])
    return rule, places, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_steps_are_those_of_torch(kind, settings, dtype):
    start, gradients = drawn(3, 2).to(dtype), [drawn(3, 2, seed=i).to(dtype) for i in range(4)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = getattr(torch.optim, kind)([parameter], **settings)
    for lr, gradient in zip(RATES, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = gradient.clone()
        optimizer.step()
    _, _, weight = walked(kind, settings, start, gradients)
    close(weight, parameter.detach(), 1e-14 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_derivatives_are_those_of_the_unrolled_run(kind, settings):
    start = drawn(3, 2)
    gradients = [drawn(3, 2, seed=i) for i in range(4)]
    ways = drawn(2, 5, 3, 2, seed=9)  # of the start and of every gradient, five directions each
    _, moved = torch.func.vmap(
        lambda a, b: torch.func.jvp(
            lambda w, *g: unrolled(kind, settings, w, g), (start, *gradients), (a, *[(i + 1) * b for i in range(4)])
        )
    )(ways[0], ways[1])
    rule, places, _ = walked(kind, settings, start, gradients)
    change, state = ways[0], {}
    for i, at in enumerate(places):
        change, state = rule.tangent(at, change, (i + 1) * ways[1], state)
    close(change, moved)

    seeds = drawn(4, 3, 2, seed=5)
    _, pull = torch.func.vjp(lambda w, *g: unrolled(kind, settings, w, g), start, *gradients)
    expected = torch.func.vmap(pull)(seeds)
    back, state, found = seeds, {}, []
    for at in reversed(places):
        by_gradient, back, state = rule.adjoint(at, back, state)
        found.append(by_gradient)
    assert state == {}  # nothing is before the first step
    for actual, truth in zip((back, *reversed(found)), expected, strict=True):
        close(actual, truth)


@pytest.mark.parametrize(("kind", "settings"), [case for case in CASES if case[1].get("eps") != 1e-30])
def test_derivatives_written_out_are_those_of_the_step_alone(kind, settings):
    """What a rule gets that writes its step only."""
    own = rule_for(kind)
    _, places, _ = walked(kind, settings, drawn(3), [drawn(3, seed=i) for i in range(4)])
    for at in places:
        change, gradient = drawn(2, 3, seed=7), drawn(2, 3, seed=8)
        state = {name: drawn(2, 3, seed=10 + i) for i, name in enumerate(at.state)}
        for mine, theirs in zip(
            torch.utils._pytree.tree_leaves(own.tangent(at, change, gradient, state)),
            torch.utils._pytree.tree_leaves(UpdateRule.tangent(own, at, change, gradient, state)),
            strict=True,
        ):
            close(mine, theirs)
        after = {name: drawn(2, 3, seed=20 + i) for i, name in enumerate(own.step(at)[1])}
        for mine, theirs in zip(
            torch.utils._pytree.tree_leaves(own.adjoint(at, change, after)),
            torch.utils._pytree.tree_leaves(UpdateRule.adjoint(own, at, change, after)),
            strict=True,
        ):
            close(mine, theirs)


def test_a_moment_of_zero_has_a_derivative_of_zero():
    at = UpdateInput(torch.ones(2), torch.tensor([0.0, 1.0]), {}, 0, options_of("Adam", {}, 0.1))
    by_gradient, _, _ = Adam().adjoint(at, torch.ones(1, 2), {})
    assert bool(by_gradient.isfinite().all())
    assert float(Adam().tangent(at, torch.zeros(1, 2), torch.ones(1, 2), {})[0].isfinite().all())


def test_coefficients_of_sgd_are_numbers():
    """One number may stand for a whole gradient."""
    settings = {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "nesterov": False}
    rule, places, _ = walked("SGD", settings, drawn(3), [drawn(3, seed=i) for i in range(4)])
    assert SGD.uniform
    assert not Adam.uniform
    ways, state = drawn(4, 7, seed=3), {}
    numbers, vectors, inner = torch.zeros(7, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64), {}
    along = drawn(3, seed=4)
    for at, way in zip(places, ways, strict=True):
        numbers, state = rule.tangent(at, numbers, way, state)
        vectors, inner = rule.tangent(at, vectors, way[:, None] * along, inner)
    close(numbers[:, None] * along, vectors)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_that_of_torch(limit):
    gradients = {"a": drawn(3, 2), "b": drawn(4, seed=1)}
    for clipping, clip in (
        (ByNorm(limit), torch.nn.utils.clip_grad_norm_),
        (ByValue(limit), torch.nn.utils.clip_grad_value_),
    ):
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        clip(parameters, limit)
        for name, parameter in zip(gradients, parameters, strict=True):
            close(clipping(gradients)[name], parameter.grad, 1e-15)


@pytest.mark.parametrize("limit", [0.5, 100.0])
@pytest.mark.parametrize("kind", [ByNorm, ByValue])
def test_derivative_of_clipping(kind, limit):
    gradients = {"a": drawn(3, 2), "b": drawn(4, seed=1)}
    changes = {"a": drawn(5, 3, 2, seed=2), "b": drawn(5, 4, seed=3)}
    found = kind(limit).derivative(gradients, changes)
    _, pull = torch.func.vjp(kind(limit), gradients)
    (back,) = torch.func.vmap(pull)(changes)
    forth = torch.func.vmap(lambda c: torch.func.jvp(kind(limit), (gradients,), (c,))[1])(changes)
    for name in gradients:
        close(found[name], back[name])
        close(found[name], forth[name])


def test_clipping_of_nothing():
    gradients, changes = {"a": torch.zeros(3)}, {"a": torch.ones(2, 3)}
    assert torch.equal(ByNorm(1.0).derivative(gradients, changes)["a"], changes["a"])


def test_groups_have_settings_of_their_own():
    entry = {
        "kind": "SGD",
        "groups": [
            {"momentum": 0.9, "weight_decay": 0.1, "parameters": ["a", "b"]},
            {"momentum": 0.0, "weight_decay": 0.0, "parameters": ["c", "d"]},
        ],
        "frozen": ["d"],
    }
    moves = update_step(entry, [0.1, 0.2])
    assert moves.options == {
        "a": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
        "b": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
        "c": {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.2},
    }
    assert isinstance(moves.rule, SGD)


def test_what_has_no_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got `Lion`\. Write a subclass of .*add_rule\('Lion'"):
        rule_for("Lion")
    with pytest.raises(ValueError, match="`amsgrad=False`, got `amsgrad=True`"):
        update_step({"kind": "AdamW", "groups": [{"amsgrad": True, "parameters": []}]}, [0.1])
    with pytest.raises(TypeError, match="instance of a subclass of `UpdateRule`, got <class"):
        add_rule("Lion", SGD)


def test_a_rule_of_ones_own_needs_its_step_only(monkeypatch):
    class Heavy(UpdateRule):
        def step(self, at):
            seen = 0.5 * at.state.get("seen", torch.zeros_like(at.weight)) + at.gradient**3
            return at.weight - at.options["lr"] * seen.tanh(), {"seen": seen}

    monkeypatch.setattr("lightning_influence.numerics.optimizers.groups._RULES", {})
    add_rule("Heavy", Heavy())
    rule, start, gradients = rule_for("Heavy"), drawn(3), [drawn(3, seed=i) for i in range(3)]

    def run(*gradients):
        weight, state = start, {}
        for count, gradient in enumerate(gradients):
            weight, state = rule.step(UpdateInput(weight, gradient, state, count, {"lr": 0.1}))
        return weight

    expected = torch.func.vmap(torch.func.vjp(run, *gradients)[1])(torch.eye(3).double())
    weight, state, places = start, {}, []
    for count, gradient in enumerate(gradients):
        places.append(UpdateInput(weight, gradient, state, count, {"lr": 0.1}))
        weight, state = rule.step(places[-1])
    back, state = torch.eye(3).double(), {}
    for at, truth in zip(reversed(places), reversed(expected), strict=True):
        by_gradient, back, state = rule.adjoint(at, back, state)
        close(by_gradient, truth)
