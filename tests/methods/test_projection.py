"""`projection=`: methods multiply sketches, exactly those of the gradients that brute force writes out."""

import oracles
import pytest
import torch
from case import Pooled, Step, both, mlp
from fits import fit
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, RandomProjection, TracInCP
from lightning_influence.conformance import check_method
from lightning_influence.numerics.projections import Projector

METHODS = (GradientDot, TracInCP)


def module(net, two_groups=False):
    torch.manual_seed(0)
    return Step(net, two_groups=two_groups).double()


class Words(nn.Module):
    """An embedding table that is also the output layer, and an attention layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, x):
        return (self.layer(self.table(x)) @ self.table.weight.T).mean(1)[:, :3]


NETS = {
    "mlp": (mlp, both(5)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), Pooled(4)), both(2, 5, 5)),
    "transformer": (Words, both(6, high=7)),
}


@pytest.mark.parametrize("structure", ["kronecker", "plain"])
@pytest.mark.parametrize("net", NETS)
def test_scores_are_products_of_the_projected_gradients(net, structure):
    make, data = NETS[net]
    model, projection = module(make()), RandomProjection(5, structure)
    train, queries = data["train"](), data["queries"]()
    names = [name for name, _ in model.named_parameters()]
    projector = Projector(projection)
    sides = []
    for items in (queries, train):
        ones = [torch.utils.data.default_collate([items[i]]) for i in range(len(items))]
        rows = oracles.rows(model, ones, names)
        sides.append({name: projector(name, r.shape[1:], r).rows(r) for name, r in rows.items()})
    assert any(side[name].numel() < rows[name].numel() for side in sides for name in names)
    attributor = Attributor(model, train)
    oracles.assert_scores(
        attributor.score(GradientDot(projection=projection), queries).values, oracles.inner(*sides), 1e-10
    )
    oracles.assert_scores(
        attributor.score(GradientDot(projection=projection), queries, aggregate="mean").values,
        oracles.inner(oracles.mean_of(sides[0]), sides[1]),
        1e-10,
    )
    own = attributor.self_influence(GradientDot(projection=projection)).values
    oracles.assert_scores(own, oracles.squared(sides[1]), 1e-10)


@pytest.mark.parametrize("structure", ["kronecker", "plain"])
@pytest.mark.parametrize("normalize", [None, "cosine", "layerwise"])
def test_room_for_every_number_gives_the_exact_scores(normalize, structure):
    train, queries = NETS["mlp"][1]["train"](), NETS["mlp"][1]["queries"]()
    attributor = Attributor(module(mlp()), train)
    exact = attributor.score(GradientDot(normalize), queries).values
    found = attributor.score(GradientDot(normalize, RandomProjection(1000, structure)), queries).values
    torch.testing.assert_close(found, exact)


@pytest.mark.slow
def test_scores_are_right_on_average_with_two_learning_rates(tmp_path):
    """The exact scores lie within four standard errors of the mean over seeds."""
    train, queries = NETS["mlp"][1]["train"](), NETS["mlp"][1]["queries"]()
    influence = Influence(dirpath=tmp_path)
    fit(module(mlp(), two_groups=True), DataLoader(train, 4), influence, max_epochs=1)
    attributor = influence.attributor
    exact = attributor.score(TracInCP(), queries).values
    found = torch.stack(
        [attributor.score(TracInCP(projection=RandomProjection(4, seed=seed)), queries).values for seed in range(60)]
    )
    error = found.std(0) / len(found) ** 0.5
    assert bool((error > 0).all())
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_projected_methods_keep_every_promise(method):
    check_method(method(projection=RandomProjection(4)))
    check_method(method(normalize="layerwise", projection=RandomProjection(4, "plain", "gaussian")))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_projection_is_refused(method):
    with pytest.raises(TypeError, match=r"Expected `projection` to be a RandomProjection or None, got 256"):
        method(projection=256)


def test_scores_say_how_they_were_projected(tmp_path):
    train = NETS["mlp"][1]["train"]()
    scores = Attributor(module(mlp()), train).score(GradientDot(projection=RandomProjection(4, seed=3)), train)
    said = {"name": "RandomProjection", "dim": 4, "structure": "kronecker", "entries": "orthogonal", "seed": 3}
    assert scores.settings["projection"] == said
