"""TracIn at every step against its double loop over the steps written out, in float64."""

import pytest
import torch
from oracles import assert_scores
from oracles_dynamic import clipped, hand_step

from lightning_influence import TracIn
from replay.runs import QUERIES, N, fitted, joint


def written_out(fit):
    """[query, train]: the sum over steps of what the definition says."""
    run, total = fit.run, torch.zeros(QUERIES, N, dtype=torch.float64)
    params = {name: value.clone() for name, value in run.start.items()}
    memory = {name: {} for name in params}
    for window, rates in zip(run.windows, run.rates, strict=True):
        here = {name: value.detach().requires_grad_(True) for name, value in params.items()}
        queries = [
            dict(zip(here, torch.autograd.grad(v, list(here.values()), retain_graph=True), strict=True))
            for v in fit.query_losses(run.module, here)
        ]
        summed, rows = {name: torch.zeros_like(v) for name, v in here.items()}, []
        for ids, batch, state in window:
            if state is not None:
                torch.set_rng_state(state)
            for i, loss in zip(ids, run.losses(run.module, here, batch), strict=True):
                share = 1.0 / (run.divisor * (len(ids) if run.mean else 1))
                found = torch.autograd.grad(loss, list(here.values()), retain_graph=True)
                row = {name: share * g for name, g in zip(here, found, strict=True)}
                rows.append((i, row))
                summed = {name: summed[name] + row[name] for name in here}
        after = clipped(summed, run.clip)
        length = lambda named: torch.cat([v.flatten() for v in named.values()]).norm()  # noqa: E731
        factor = length(after) / length(summed) if run.clip else 1.0
        for (names, settings), lr in zip(run.groups, rates, strict=True):
            pull = lr * factor / (1.0 - settings.get("momentum", 0.0))
            for i, row in rows:
                for q, query in enumerate(queries):
                    total[q, i] += pull * sum((query[name] * row[name]).sum() for name in names)
            for name in names:
                params[name] = hand_step(run.kind, settings, here[name], after[name], memory[name], lr).detach()
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"groups": ({"momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.03})},
        {"divisor": 2, "clip": ("norm", 0.3), "net": "dropout"},
        {"divisor": 2, "net": "batchnorm"},
    ],
    ids=["two groups", "accumulation, clipping, dropout", "batchnorm"],
)
def test_it_is_the_double_loop(options, tmp_path):
    fit = fitted(tmp_path, **options)
    expected = written_out(fit)
    for loss in (joint,) if options.get("net") == "batchnorm" else (None, joint):
        found = fit.attributor(loss).score(TracIn(), fit.queries)
        assert_scores(found.values, expected, 1e-10)
        assert found.figures["drift"] <= 1e-12


def test_units_and_settings(tmp_path):
    fit = fitted(tmp_path, kind="AdamW", lr=0.01)
    assert fit.attributor().score(TracIn(), fit.queries).units == "arbitrary"
    with pytest.raises(ValueError, match="`max_drift` to be a positive number, got -1"):
        TracIn(max_drift=-1)
