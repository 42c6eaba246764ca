"""What methods work with: stages that are never stale, kept state, tiles and costs of each kind, your own methods."""

import hashlib
import json
import math
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    SOURCE,
    Attributor,
    DataShapley,
    ExactGGN,
    GradientDot,
    GradientProduct,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    Method,
    RepresenterPoints,
    TracIn,
    TracInCP,
    TracInIdeal,
)
from lightning_influence.curvature.store import prepared_at
from lightning_influence.gradients import reduction_probe
from lightning_influence.methods import kinds, method
from lightning_influence.methods.hydra import HyDRADuringFit
from lightning_influence.methods.method import Cost, Tile
from lightning_influence.replay.replay import Replay
from lightning_influence.setting import setting as questions


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (n,), generator=draw)
    )


N = 23
TRAIN, QUERIES = data(N), data(7, seed=1)


@pytest.fixture(scope="module")
def attributor(tmp_path_factory):
    """After three epochs: the initial weights and three checkpoints."""
    torch.manual_seed(0)
    net, influence = Net(), Influence(dirpath=tmp_path_factory.mktemp("run"))
    pl.Trainer(**QUIET, max_epochs=3, callbacks=[influence]).fit(net, DataLoader(TRAIN, 5, shuffle=True))
    return Attributor(net, TRAIN, influence.trajectory, batch_size=5)


# ---- stages ---------------------------------------------------------------------------------------------------------


def assert_stale(stage, queries):
    for use in (lambda: stage.gradients(queries), lambda: next(stage.train())):
        with pytest.raises(RuntimeError, match=rf"Expected the weights of the stage at step {stage.step} to be loaded"):
            use()


def loaded_gradients(stage, queries):
    """Both kinds of gradients of a stage, as matrices of products with one another."""
    query = stage.gradients(queries)
    return torch.cat([query.dot(block) for _, block in stage.train()], 1)


def replayed(setting):
    replay = Replay(setting.engine, setting.examples, setting.trajectory)
    with replay.training():
        first = next(iter(replay.walk(replay.start(), replay.steps[:1])))
        replay.load(first.before, first.step)


@pytest.mark.parametrize(
    "load_others",
    [
        lambda setting: setting.final(),
        lambda setting: next(setting.stages([0])),
        lambda setting: next(setting.stages()),
        replayed,
        lambda setting: setting.queries.engine.task.load(setting.task.named_parameters(), {}),
    ],
    ids=["final", "stages", "stages by default", "replay", "the queries' task"],
)
@pytest.mark.parametrize("measurement", [None, lambda module, batch: module.net(batch[0]).sum(1)])
def test_a_stage_raises_once_other_weights_are_loaded(attributor, load_others, measurement):
    source = attributor._queries(QUERIES)
    with attributor._session.open(source, measurement) as setting:
        stage = next(setting.stages([1]))
        before = loaded_gradients(stage, setting.queries)
        load_others(setting)
        assert_stale(stage, setting.queries)
        again = next(setting.stages([1]))
        assert torch.equal(loaded_gradients(again, setting.queries), before)


def test_a_stage_raises_in_the_middle_of_its_blocks(attributor):
    with attributor.session(QUERIES) as setting:
        blocks = setting.final().train()
        next(blocks)
        setting.final()
        with pytest.raises(RuntimeError, match="to be loaded, got others"):
            next(blocks)


def test_the_loop_over_stages_leaves_each_stage_stale(attributor):
    with attributor.session(QUERIES) as setting:
        stages = list(setting.stages())
        for stage in stages[:-1]:
            assert_stale(stage, setting.queries)
        loaded_gradients(stages[-1], setting.queries)


def test_without_a_trajectory_the_modules_own_weights_do_not_come_back():
    with Attributor(Net(), TRAIN).session(QUERIES) as setting:
        stage = setting.final()
        loaded_gradients(stage, setting.queries)
        setting.task.load({name: p + 1 for name, p in setting.task.named_parameters().items()}, {})
        assert_stale(stage, setting.queries)
        assert_stale(setting.final(), setting.queries)


@pytest.mark.parametrize("captured", [True, False])
def test_a_stage_does_not_outlive_its_question(attributor, captured):
    with (attributor if captured else Attributor(Net(), TRAIN)).session(QUERIES) as setting:
        stage = setting.final()
    assert_stale(stage, setting.queries)


@pytest.mark.parametrize("captured", [True, False])
def test_a_stage_of_another_tile_raises(attributor, captured):
    with (attributor if captured else Attributor(Net(), TRAIN)).session(QUERIES) as setting:
        setting.ids = range(0, 10)
        stage = setting.final()
        setting.ids = range(10, 20)
        stage.gradients(setting.queries)  # queries have nothing to do with the tile
        with pytest.raises(RuntimeError, match=r"training examples range\(10, 20\), got one of range\(0, 10\)"):
            next(stage.train())


def test_no_curvature_of_other_weights_is_prepared_for_a_stage(attributor):
    folder = attributor.trajectory.path / "curvature"
    with attributor.session(QUERIES) as setting:
        stage = next(setting.stages([1]))
        setting.final()
        with pytest.raises(RuntimeError, match="to be loaded, got others"):
            prepared_at(ExactGGN(damping=0.5), setting, stage)
    assert not folder.is_dir() or not list(folder.iterdir())


# ---- kept state -----------------------------------------------------------------------------------------------------


class Kept:
    def __init__(self, *arguments):
        self.arguments = arguments


class AlsoKept(Kept):
    pass


def test_state_is_one_object_per_owner_and_kind(attributor):
    with attributor.session(QUERIES) as setting:
        first = setting.state(GradientDot(), Kept, 1)
        assert first.arguments == (1,)
        assert setting.state(GradientDot(), Kept, 2) is first, "made at the first call only"
        assert type(setting.state(GradientDot(), AlsoKept)) is AlsoKept
        assert setting.state(GradientDot(normalize="cosine"), Kept) is not first
        assert setting.state(TracInCP(), Kept) is not first
    with attributor.session(QUERIES) as setting:
        assert setting.state(GradientDot(), Kept) is not first, "kept no longer than the question"


# ---- tiles and costs of each kind -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(Method):
    """A method of a third party that has no kind."""

    factor: float = 1.0

    def score(self, setting, queries):
        stage, total = setting.final(), setting.zeros(queries)
        query = stage.gradients(queries)
        for columns, block in stage.train():
            total[:, columns] = self.factor * query.dot(block)
        return total


@dataclass(frozen=True)
class Few(GradientDot):
    def queries_at_once(self, setting):
        return 3


@dataclass(frozen=True)
class FewAtOnce(TracIn):
    def queries_at_once(self, setting):
        return 3


@pytest.mark.parametrize(
    ("asked", "roomy", "tight"),
    [
        # Whole blocks of 5 training examples, as many as 40 numbers for 7 queries (or fewer) allow.
        (GradientDot(), Tile(None, 2**25 // 7 // 5 * 5), Tile(None, 5)),
        (Mine(), Tile(None, 2**25 // 7 // 5 * 5), Tile(None, 5)),
        (Few(), Tile(3, 2**25 // 3 // 5 * 5), Tile(3, 10)),
        # The whole training set, for as many queries as 40 numbers allow.
        (TracIn(), Tile(None, N), Tile(1, N)),
        (FewAtOnce(), Tile(3, N), Tile(1, N)),
        (HyDRA.during_fit(), Tile(None, N), Tile(1, N)),
        (TracInIdeal(), Tile(None, N), Tile(1, N)),
        (KNNShapley(), Tile(2**25 // N, N), Tile(1, N)),
        (RepresenterPoints(), Tile(2**25 // N, N), Tile(1, N)),
        (LeaveOneOut(), Tile(2**25 // N, N), Tile(1, N)),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_tiles(attributor, monkeypatch, asked, roomy, tight):
    with attributor.session(QUERIES) as setting:
        found = asked.tile(setting, setting.queries)
        assert found.train == roomy.train
        assert found.queries >= 7 if roomy.queries is None else found.queries == roomy.queries
        monkeypatch.setattr(method, "TILE", 40)
        monkeypatch.setattr(kinds, "TILE", 40)
        found = asked.tile(setting, setting.queries)
        assert found.train == tight.train
        assert found.queries >= 7 if tight.queries is None else found.queries == tight.queries


def test_queries_that_do_not_fit_in_memory_are_held_one_by_one(attributor, monkeypatch):
    monkeypatch.setattr(questions, "GRADIENT_BYTES", 1)
    monkeypatch.setattr(method, "TILE", 40)
    with attributor.session(QUERIES) as setting:
        assert GradientDot().tile(setting, setting.queries) == Tile(1, 40)
        assert TracIn().tile(setting, setting.queries) == Tile(1, N)


@pytest.mark.parametrize(
    ("asked", "checkpoints"),
    [
        (GradientDot(), 1),
        (Mine(), 1),
        (InfluenceFunction(ExactGGN()), 1),
        (InfluenceFunction(ExactGGN(), checkpoints=(1, 2)), 2),
        (SOURCE(2, ExactGGN()), 3),
        (TracInCP(), 3),
        (TracInCP(checkpoints=(-1,)), 1),
        (TracIn(), 1),
        (HyDRA(checks=2), 1),
        (HyDRA.during_fit(), 1),
        (TracInIdeal(), 1),
        (KNNShapley(), 1),
        (RepresenterPoints(), 1),
        (LeaveOneOut(), 1),
        (DataShapley(), 1),
    ],
    ids=repr,
)
def test_costs(attributor, asked, checkpoints):
    with attributor.session(QUERIES) as setting:
        for queries in (setting.queries, None):
            cost = asked.cost(setting, queries)
            assert type(cost) is Cost
            assert math.isfinite(cost.seconds)
            assert 0 <= cost.seconds < 60
            assert cost.queries_at_once >= 1
            assert cost.checkpoints == checkpoints
        refused_at_once = asked == HyDRA.during_fit()  # this fit had no tracker
        assert (asked.cost(setting, setting.queries).seconds > 0) is not refused_at_once


@pytest.mark.parametrize("asked", [GradientDot("cosine"), TracInCP(normalize="cosine", checkpoints=(0,))], ids=repr)
def test_constant_self_influence_is_refused_whatever_the_weights(attributor, asked):
    with pytest.raises(ValueError, match=r"Expected `normalize=None` for self-influence, got 'cosine'"):
        attributor.self_influence(asked)


# ---- methods of one's own -------------------------------------------------------------------------------------------


def test_a_method_needs_nothing_but_score(attributor):
    expected = attributor.score(GradientDot(), QUERIES)
    found = attributor.score(Mine(2.0), QUERIES)
    torch.testing.assert_close(found.values, 2 * expected.values, rtol=1e-12, atol=0)
    assert (found.method, found.units, found.settings) == ("Mine", "arbitrary", {"factor": 2.0})
    strongest = attributor.score(Mine(), QUERIES, top_k=3).proponents(3)
    assert torch.equal(strongest.train_ids, expected.proponents(3).train_ids)
    group = attributor.group(Mine(), [1, 4, 22], QUERIES)
    torch.testing.assert_close(group, expected.values[:, [1, 4, 22]].sum(1), rtol=1e-12, atol=1e-15)
    assert attributor.cost(Mine(), QUERIES) > 0
    with pytest.raises(NotImplementedError, match=r"`Mine` has no self-influence\. Use `TracInCP\(\)`"):
        attributor.self_influence(Mine())


# ---- HyDRA's two modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: HyDRA("during_fit"), HyDRA.during_fit),
        (lambda: HyDRA(mode="during_fit"), HyDRA.during_fit),
        (
            lambda: HyDRA("during_fit", False, [4, 1], 2**20),
            lambda: HyDRA.during_fit(hessian=False, examples=(1, 4), memory=2**20),
        ),
        (
            lambda: HyDRA(mode="during_fit", examples=torch.tensor([4, 1, 4]), hessian=False, memory=2**20),
            lambda: HyDRA.during_fit(False, [1, 4], 2**20),
        ),
    ],
)
def test_the_old_call_is_the_new_one(old, new):
    assert type(old()) is HyDRADuringFit
    assert old() == new()
    assert hash(old()) == hash(new())
    assert repr(old()) == repr(new())
    assert old().record == new().record
    copy = pickle.loads(pickle.dumps(old()))
    assert (type(copy), copy, copy.record) == (HyDRADuringFit, new(), new().record)


# The hyper-parameters of the version that had one class for both modes, as JSON with sorted keys.
_EARLIER = (
    '{{"checks": 4, "examples": {examples}, "hessian": {hessian}, "max_drift": 0.1, "memory": {memory}, '
    '"mode": "during_fit", "removal": "downweight", "runs": 1}}'
)


@pytest.mark.parametrize(
    ("asked", "hessian", "examples", "memory"),
    [
        (HyDRA.during_fit(), "true", "null", 1073741824),
        (HyDRA.during_fit(hessian=False), "false", "null", 1073741824),
        (HyDRA("during_fit", True, [4, 1, 4], 5), "true", "[1, 4]", 5),
    ],
)
def test_records_of_earlier_versions_are_found(asked, hessian, examples, memory):
    text = _EARLIER.format(examples=examples, hessian=hessian, memory=memory)
    assert asked.record == f"HyDRA-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def test_both_modes_can_be_replaced_and_pickled():
    by_replay = HyDRA(hessian=False, examples=(3, 2), checks=0)
    assert replace(by_replay, runs=3) == HyDRA(hessian=False, examples=(2, 3), checks=0, runs=3)
    assert pickle.loads(pickle.dumps(by_replay)) == by_replay
    watched = HyDRA.during_fit(examples=(3, 2))
    assert replace(watched, memory=7) == HyDRA.during_fit(examples=(2, 3), memory=7)
    assert replace(watched, memory=7).record == HyDRA("during_fit", examples=(2, 3), memory=7).record
    assert replace(by_replay, mode="during_fit") == HyDRA.during_fit(False, (2, 3))
    for changed in ({"runs": 0}, {"mode": "later"}):
        with pytest.raises(ValueError, match=r"Expected `(runs|mode)` to be"):
            replace(by_replay, **changed)
    with pytest.raises(ValueError, match="Expected `memory` to be"):
        replace(watched, memory=0)


@pytest.mark.parametrize("wrong", [0.5, torch.ones(N), torch.ones(2, N)], ids=["number", "row", "two groups"])
def test_weights_of_another_shape_are_refused(attributor, wrong):
    @dataclass(frozen=True)
    class Weighted(TracInCP):
        def weight(self, stage):
            return wrong

    with pytest.raises(ValueError, match=rf"Expected `Weighted.weight` to return a tensor of shape \[1, {N}\], got"):
        attributor.score(Weighted(), QUERIES)


@pytest.mark.parametrize(
    ("name", "value", "now"),
    [("whole", True, "WholeRun"), ("settings", lambda self: {}, "hyperparameters"), ("unknowns", True, "Retraining")],
)
def test_what_earlier_versions_asked_for_is_not_ignored(name, value, now):
    annotations = {name: ClassVar[bool]} if value is True else {}
    with pytest.raises(TypeError, match=f"no `Old.{name}`, which was replaced by .*{now}"):
        type("Old", (Method,), {name: value, "__annotations__": annotations})


def test_a_stage_raises_while_another_question_has_loaded_other_weights(attributor):
    other = Attributor(attributor.module, TRAIN, attributor.trajectory)
    with attributor.session(data(3, 1)) as setting:
        stage = next(iter(setting.stages([0])))
        before = stage.gradients(setting.queries).dense()
        with other.session() as inner:
            inner.final()
            with pytest.raises(RuntimeError, match="Expected the weights of the stage"):
                stage.gradients(setting.queries)
        after = stage.gradients(setting.queries).dense()  # its weights are back
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("weight", lambda self, stage: torch.ones(1, 1)),
        ("product", lambda self, stage, query, block: query.dot(block.gradients)[:, :1]),
        ("product_with_itself", lambda self, stage, block: block.gradients.norm2()[:1]),
    ],
)
def test_shapes_that_would_be_broadcast_are_refused(attributor, part, broken):
    asked = dataclass(frozen=True)(type("Broken", (GradientProduct,), {part: broken}))()
    with pytest.raises(ValueError, match=f"Expected `Broken.{part}` to return"):
        attributor.self_influence(asked) if part == "product_with_itself" else attributor.score(asked, data(3, 1))


def test_the_mode_is_saved_with_the_scores():
    assert [asked.hyperparameters()["mode"] for asked in (HyDRA(), HyDRA.during_fit())] == ["replay", "during_fit"]


@pytest.mark.parametrize(("name", "value"), [("checks", 0), ("max_drift", 0.5)])
def test_records_of_earlier_versions_name_what_only_a_replay_reads(name, value):
    known = {"checks": 4, "examples": None, "hessian": True, "max_drift": 0.1, "memory": 2**30, "mode": "during_fit"}
    text = json.dumps(known | {"removal": "downweight", "runs": 1, name: value}, sort_keys=True)
    asked = HyDRA(mode="during_fit", **{name: value})
    assert asked.record == f"HyDRA-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    assert pickle.loads(pickle.dumps(asked)).record == asked.record
    assert asked == HyDRA.during_fit()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_drift": -1.0}, ValueError, "`max_drift` to be a positive number, got -1.0"),
        ({"runs": 0}, ValueError, "`runs` to be a positive integer, got 0"),
        ({"checks": 1}, ValueError, "`checks` to be 0 or at least 2 refits, got 1"),
        ({"removal": "foo"}, ValueError, "`removal` to be one of 'downweight', 'renormalize', got 'foo'"),
        ({"memory": -3}, ValueError, "`memory` to be a positive integer, got -3"),
        ({"examples": 3}, TypeError, "`examples` to be ids of training examples or None, got 3"),
    ],
)
def test_bad_values_are_refused_in_both_modes(options, error, text):
    for mode in ("replay", "during_fit"):
        with pytest.raises(error, match=f"Expected {text}"):
            HyDRA(mode=mode, **options)


def test_what_is_no_method_is_refused_by_the_callback():
    class Duck:
        score = print

    with pytest.raises(TypeError, match=r"Expected `methods` to hold methods such as `TracInCP\(\)`, got .*Subclass"):
        Influence([Duck()])


def test_gradients_that_are_only_measured_are_not_checked(attributor):
    with attributor._session.open(attributor._queries(QUERIES)) as setting:
        setting.queries.at_once()
        assert setting.queries.engine.guard.made == setting.engine.guard.made == 0


def test_a_plain_mean_takes_no_gradients_to_be_recognised(attributor, monkeypatch):
    """Neither the data's own sums nor ours of the loss are what the step counts."""

    class Summing(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            x, y = TRAIN[i]
            return x / x.abs().sum() * float(x.abs().sum()), y

    monkeypatch.setattr(reduction_probe, "GradientProbe", None)
    other = Attributor(attributor.module, Summing(), attributor.trajectory, check_data=False)
    assert other.score(GradientDot(), QUERIES).values.shape == (len(QUERIES), N)
