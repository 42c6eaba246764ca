"""Ceilings on how often the host waits for a device, and on copies to it."""

import functools
import shutil

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import devices
from devices.fits_on import Net, data, trainer
from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LiSSA,
    RepresenterPoints,
    TracIn,
    TracInCP,
)

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
BLOCK = 8
FEW, MANY = 4, 8  # blocks


@functools.cache
def fit(blocks, folder):
    """(module, training data, trajectory) of two epochs, each of one step."""
    torch.manual_seed(0)
    module, train = Net(), data(blocks * BLOCK, 1, torch.float32)
    influence = Influence([], dirpath=folder / str(blocks), log_scores=False)
    trainer(callbacks=[influence]).fit(module, DataLoader(train, len(train)))
    return module, train, influence.trajectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fits")


def asking(blocks, folder, of=None):
    module, train, trajectory = fit(blocks, folder) if of is None else (*of, None)
    return Attributor(module, train, trajectory, trainer=trainer(devices.HERE), batch_size=BLOCK)


def counts_of(ask, question):
    """Of a first question, and of a second one."""
    found = []
    for _ in range(2):
        with devices.counted() as counts:
            question(ask)
        found.append(counts)
    return found


def scores(method, **options):
    return lambda ask: ask.score(method, data(BLOCK, 2, torch.float32), **options)


# Waits for the device: of a first question about few blocks and of a second one. Further blocks of it have none. At
# most 20, but for solvers that wait once a product, which is a pass over all data (11 in LiSSA, 10 in Arnoldi), and for
# SOURCE, which prepares a curvature for each of its two segments.
# And how many copies to the device the host waits for, of a first question, whatever the model's number of parameters.
CEILINGS = {
    "TracInCP": (scores(TracInCP()), 12, 10, 8),
    "GradientDot": (scores(GradientDot()), 10, 8, 6),
    "top-k": (scores(TracInCP(), top_k=3), 16, 14, 11),
    "EKFAC": (scores(InfluenceFunction(EKFAC())), 20, 13, 9),
    "LiSSA": (scores(InfluenceFunction(LiSSA(damping=1.0))), 27, 17, 15),
    "ConjugateGradient": (scores(InfluenceFunction(ConjugateGradient(damping=1.0))), 20, 17, 14),
    "Arnoldi": (scores(InfluenceFunction(Arnoldi(damping=0.1, steps=10))), 28, 11, 12),
    "ExactGGN": (scores(InfluenceFunction(ExactGGN(damping=0.1))), 15, 10, 11),
    "SOURCE": (scores(SOURCE(segments=2)), 27, 13, 12),
    "HyDRA": (scores(HyDRA()), 19, 17, 11),
    "TracIn": (scores(TracIn()), 16, 13, 10),
    "KNNShapley": (scores(KNNShapley()), 5, 5, 6),
    "RepresenterPoints": (scores(RepresenterPoints()), 9, 9, 12),
    "self-influence": (lambda ask: ask.self_influence(TracInCP()), 9, 7, 8),
    "self-influence by EKFAC": (lambda ask: ask.self_influence(InfluenceFunction(EKFAC())), 18, 11, 9),
    "a group": (lambda ask: ask.group(TracInCP(), [1, 4], data(BLOCK, 2, torch.float32)), 16, 14, 10),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_the_host_seldom_waits(name, folder):
    question, first, again, pageable = CEILINGS[name]
    for kept in [*folder.rglob("curvature"), *folder.rglob("features")]:  # of other questions
        shutil.rmtree(kept)
    some, more = (counts_of(asking(n, folder), question) for n in (FEW, MANY))
    assert some[0].waits <= first
    assert some[0].pageable <= pageable
    assert some[1].waits <= again
    assert more[1].waits <= some[1].waits + 2


@devices.standin_only
def test_blocks_are_copied_to_the_device_once_and_from_pinned_memory(folder):
    few, many = 10, 20
    some, more = (counts_of(asking(n, folder), scores(GradientDot()))[1] for n in (few, many))
    copies, blocks = more.to_device - some.to_device, many - few
    assert copies <= blocks * 2.2  # inputs and labels; now and then an example for a spot check
    assert copies == more.pinned - some.pinned


@pytest.mark.parametrize("place", ["cpu", devices.HERE])
def test_a_step_is_waited_for_once_wherever_its_learning_rate_is(place, tmp_path):
    found = []
    for epochs in (2, 6):
        rate = torch.tensor(0.01, device=place) if place == devices.HERE else 0.01
        module, train = Net(optimizer=torch.optim.AdamW, lr=rate, capturable=True), data(8, 1, torch.float32)
        influence = Influence([], dirpath=tmp_path, log_scores=False, every_n_epochs=100)
        with devices.counted() as counts:
            trainer(devices.HERE, callbacks=[influence], max_epochs=epochs).fit(module, DataLoader(train, 8))
        found.append(counts.waits)
        assert influence.trajectory.learning_rates(-1) == pytest.approx([0.01])
    assert found[1] - found[0] <= 4


class Looks(Net):
    """Looks up words in a table."""

    def __init__(self):
        super().__init__()
        self.words, self.out = torch.nn.Embedding(20, 4), torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.out(self.words((10 * x).long() % 20).mean(1)), y)


def test_a_look_up_waits_four_times_for_each_block(folder):
    found = []
    for blocks in (FEW, MANY):
        train, queries = data(blocks * BLOCK, 1, torch.float32), data(BLOCK, 2, torch.float32)
        ask = asking(0, None, (Looks(), train))
        found.append(counts_of(ask, lambda ask: ask.score(GradientDot(), queries))[1].waits)
    assert found[1] - found[0] <= 4 * (MANY - FEW)


class Unequal(Net):
    """Its loss ignores labels of 2, of which blocks have different numbers, and weighs examples equally."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), torch.where(y == 2, -100, y), reduction="sum") / len(y)


class Weighed(Net):
    """A mean over the labels that are not ignored weighs examples by their batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, ignore_index=2)


def late(blocks=40):
    """Training data of which only the last block has a label of 2."""
    train = data(blocks * BLOCK, 1, torch.float32)
    labels = train.tensors[1] % 2
    labels[-3] = 2
    return TensorDataset(train.tensors[0], labels)


def test_an_example_that_weighs_otherwise_is_refused_however_late_it_comes():
    ask = asking(0, None, (Weighed(), late()))
    with pytest.raises(ValueError, match=r"Expected .* to weigh in its batch"):
        ask.score(GradientDot(), data(BLOCK, 2, torch.float32))


def test_where_examples_are_unequal_in_all_blocks_scores_are_those_of_the_cpu():
    torch.manual_seed(0)
    module, train = Unequal(), data(FEW * BLOCK, 1, torch.float32)
    queries = data(BLOCK, 2, torch.float32)
    found = asking(0, None, (module, train)).score(GradientDot(), queries).values
    expected = Attributor(module, train, batch_size=BLOCK).score(GradientDot(), queries).values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
