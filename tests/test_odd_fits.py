"""Fits that end early, begin late, or have no step; queries of another kind: the messages name cause and way out."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, both, mlp
from fits import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory

DATA = both(5)


def loader():
    return DataLoader(DATA["train"](), 4)


def trainer_of(influence, **options):
    return pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [influence], **options})


def influence_of(folder, **options):
    return Influence([TracInCP()], **{"queries": DATA["queries"](), "dirpath": folder, "max_cost": 1e9, **options})


class Fails(Step):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_scores_of_a_fit_that_failed_say_why_and_how_to_go_on(tmp_path):
    influence = influence_of(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer_of(influence).fit(Fails(mlp()).double(), loader())
    for results in (influence.scores, influence.self_scores):
        with pytest.raises(KeyError) as caught:
            results["TracInCP"]
        assert "RuntimeError: out of memory" in str(caught.value)
        assert "\n  trajectory = Trajectory.load(" in str(caught.value)  # lines, not their repr
    scores = influence.attributor.score(TracInCP(), DATA["queries"]())
    assert any("did not finish" in note for note in scores.notes)


class WithoutOptimizer(Step):
    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_a_run_without_a_step_is_named(tmp_path):
    influence = influence_of(tmp_path, self_influence=True)
    with pytest.warns(UserWarning, match="no optimizer step"):
        trainer_of(influence).fit(WithoutOptimizer(mlp()).double(), loader())
    for results in (influence.scores, influence.self_scores):
        with pytest.raises(KeyError, match="no optimizer step"):
            results["TracInCP"]


def test_scores_that_were_not_asked_for_say_so(tmp_path):
    influence = influence_of(tmp_path, queries=None, self_influence=True)
    trainer_of(influence).fit(Step(mlp()).double(), loader())
    with pytest.raises(KeyError, match="no `queries` were given"):
        influence.scores["TracInCP"]
    influence = influence_of(tmp_path)
    trainer_of(influence).fit(Step(mlp()).double(), loader())
    with pytest.raises(KeyError, match="`self_influence=True` was not given"):
        influence.self_scores["TracInCP"]


class MadeInSetup(Step):
    def __init__(self):
        super().__init__(nn.Identity())

    def setup(self, stage):
        self.net = mlp().double()


def test_layers_made_in_setup_are_asked_for(tmp_path):
    influence = influence_of(tmp_path)
    trainer_of(influence).fit(MadeInSetup(), loader())
    later = MadeInSetup()
    with pytest.raises(ValueError, match=r'`net.0.weight`.*call `module.setup\("fit"\)` first'):
        Attributor(later, loader(), Trajectory.load(tmp_path)).score(TracInCP(), DATA["queries"]())
    later.setup("fit")
    again = Attributor(later, loader(), Trajectory.load(tmp_path)).score(TracInCP(), DATA["queries"]())
    torch.testing.assert_close(again.values, influence.scores["TracInCP"].values, rtol=1e-10, atol=0)


def test_a_second_fit_of_a_trainer_says_where_its_scores_begin(tmp_path):
    influence = influence_of(tmp_path)
    trainer = trainer_of(influence)
    module = Step(mlp()).double()
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match="begins at step 4, .* its Trainer was fitted before"):
        trainer.fit(module, loader())
    assert any("begins at step 4" in note for note in influence.scores["TracInCP"].notes)


@pytest.mark.parametrize(
    ("queries", "shown"),
    {
        "dicts": (lambda: Items([{"x": x, "y": y} for x, y in DATA["queries"]()]), "{'x': (1, 5) float64, 'y'"),
        "inputs without targets": (lambda: TensorDataset(torch.randn(3, 5)), "[(1, 5) float32]: ValueError"),
        "a tensor": (lambda: torch.randn(3, 5), "(1, 5) float32: "),
    }.values(),
)
def test_queries_of_another_kind_are_shown_beside_training_data(queries, shown):
    attributor = Attributor(Step(mlp()).double(), loader())
    with pytest.raises(ValueError, match="built like the training data") as caught:
        attributor.score(GradientDot(), queries())
    assert "[(1, 5) float64, (1,) int64]" in str(caught.value)
    assert shown in str(caught.value)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA["train"]())


def test_data_that_cannot_be_read_again_come_with_the_way_out(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(influence_of(tmp_path)).fit(Step(mlp()).double(), DataLoader(Stream(), 4))
    messages = [str(w.message) for w in caught]
    assert any("Scores were not computed" in m and "`Influence(sample_id=, lookup=)`" in m for m in messages)
    assert any("its own iteration" in m for m in messages)


class OwnRate(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"eta": 0.05})

    def step(self, closure=None):
        return closure()


def test_an_optimizer_without_a_learning_rate_is_named_and_the_fit_goes_on(tmp_path):
    module = Step(mlp()).double()
    module.configure_optimizers = lambda: OwnRate(module.parameters())
    with pytest.warns(UserWarning, match="OwnRate to have its learning rate under 'lr'"):
        trainer_of(influence_of(tmp_path)).fit(module, loader())


def test_autocast_of_the_caller_is_off_while_scoring_and_on_afterwards():
    module = Step(mlp())
    data = both(5, dtype=torch.float32)
    plain = Attributor(module, DataLoader(data["train"](), 4)).score(GradientDot(), data["queries"]())
    with torch.autocast("cpu", torch.bfloat16):
        cast = Attributor(module, DataLoader(data["train"](), 4)).score(GradientDot(), data["queries"]())
        assert torch.is_autocast_enabled("cpu")
        assert F.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype is torch.bfloat16
    assert torch.equal(plain.values, cast.values)


def test_a_method_by_name_is_corrected():
    with pytest.raises(TypeError, match=r"Write `\[TracInCP\(\)\]`"):
        Influence("TracInCP")
