"""Which path each parameter takes: the self-check heals a broken rule so well that scores alone would not show it."""

import pytest
import torch
from cases import CASES
from cases_layers import LAYERS
from test_cases import Asked, replace

from lightning_influence import GradientDot

torch.set_num_threads(1)
OTHERWISE = {
    "a computed weight that is written to",
    "EmbeddingBag, max",
    "EmbeddingBag with offsets",
    "InstanceNorm with running statistics",
    "PReLU",
    "PReLU by channel",
    "Embedding, max_norm",  # one example at a time: the table is written in place
    "a mask written to in the step",  # it depends on the index of a batch
    "a parameter without entries",  # no path
}
ALSO = [
    "MultiheadAttention, batch first",
    "MultiheadAttention, time first",
    "TransformerEncoder",
    "TransformerEncoder with padding",
    "tied embedding and output",
    "class token and positions",
    "positions of time-major activations",
    "compiled module",
    "gradient checkpointing",
    "gradient checkpointing, reentrant",
    "activations in place",
    "LSTM",
    "GRU, time first",
    "LSTM, two layers, both directions",
    "LSTM with projections",
    "GRUCell in a loop",
    "LSTMCell in a loop",
    "buffers updated in forward",
    "torchmetrics in the step",
    "segmentation map",
    "examples sorted inside",
    "experts by token",
]
FACTORED = [case.name for case in LAYERS if case.name not in OTHERWISE] + ALSO


def summary(name, folder):
    asked = Asked(replace(CASES[name], fit=False), folder)
    notes = asked.attributor.self_influence(GradientDot()).notes
    return next(note for note in notes if "parameters were computed the fast way" in note)


@pytest.mark.parametrize("name", FACTORED)
def test_every_parameter_has_a_factored_rule(name, tmp_path):
    assert ";" not in summary(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["EmbeddingBag, max", "regulariser inside the loss"],
)
def test_what_has_no_rule_goes_by_torch_func_and_is_named(name, tmp_path):
    assert "; through torch.func: net." in summary(name, tmp_path)


def test_what_torch_func_refuses_goes_one_example_at_a_time(tmp_path):
    assert "; one example at a time: net." in summary("packed sequences sorted by length", tmp_path)


def test_parameters_that_the_loss_does_not_reach_cost_nothing(tmp_path):
    text = summary("a layer that the loss does not reach", tmp_path)
    assert "not used by the loss: net.unused.weight, net.unused.bias, net.detached.weight" in text
