"""What an error leaves of the scores: only what is final, attached to the error, and saved at the end of a fit."""

import pytest
import torch
from case import Items, Step, inputs, mlp
from cases_guard import MISSED, classes
from fits import fit as run_fit
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, Scores, SelfScores, TracInCP, Trajectory
from lightning_influence.setting.setting import Stage

torch.set_num_threads(1)
N, BLOCK, CHECKPOINTS = 24, 8, 3
TRAIN, QUERIES = inputs(5, n=N)(), inputs(5, n=6, seed=2)()
BLOCKS = N // BLOCK


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    torch.manual_seed(0)
    module, influence = Step(mlp()).double(), Influence(dirpath=tmp_path_factory.mktemp("runs"))
    run_fit(module, DataLoader(TRAIN, 4), influence, max_epochs=CHECKPOINTS)
    trajectory = Trajectory.load(influence.run_dir)
    return lambda: Attributor(module, TRAIN, trajectory, batch_size=BLOCK)


def fail(monkeypatch, at, error=None):
    """Fail when the gradients of this many blocks of training examples have been used."""
    train, left = Stage.train, [at]

    def failing(self, where=None):
        for found in train(self, where):
            if not left[0]:
                left[0] = -1
                raise error or RuntimeError("no such luck")
            left[0] -= 1
            yield found

    monkeypatch.setattr(Stage, "train", failing)


def caught(work, kind=RuntimeError):
    with pytest.raises(kind) as found:
        work()
    return found.value


def small_tiles(monkeypatch):
    monkeypatch.setattr("lightning_influence.methods.method.TILE", BLOCK * 6)


def few_queries(monkeypatch):
    monkeypatch.setattr(TracInCP, "queries_at_once", lambda self, setting: 2)


@pytest.mark.parametrize("tiles", [1, 2])
def test_finished_training_examples_are_kept(asked, tiles, monkeypatch):
    full = asked().score(TracInCP(), QUERIES)
    small_tiles(monkeypatch)
    fail(monkeypatch, tiles * CHECKPOINTS + 1)
    error = caught(lambda: asked().score(TracInCP(), QUERIES))
    assert str(error).startswith("no such luck `error.scores` holds")
    assert f"{tiles * BLOCK} of 24 training examples for 6 of 6 queries" in str(error)
    assert error.scores.train_ids.tolist() == list(range(tiles * BLOCK))
    assert torch.equal(error.scores.values, full.values[:, : tiles * BLOCK])
    assert error.scores.checkpoints == full.checkpoints
    assert "RuntimeError ended the computation" in error.scores.notes[0]


@pytest.mark.parametrize("top_k", [None, 3])
def test_finished_queries_are_kept(asked, top_k, monkeypatch):
    few_queries(monkeypatch)
    full = asked().score(TracInCP(), QUERIES, top_k=top_k)
    fail(monkeypatch, 2 * BLOCKS * CHECKPOINTS + 1)
    error = caught(lambda: asked().score(TracInCP(), QUERIES, top_k=top_k))
    assert error.scores.query_ids.tolist() == [0, 1, 2, 3]
    for found, expected in zip(error.scores.proponents(3), full.proponents(3), strict=True):
        assert torch.equal(found, expected[:4])
    assert error.scores.top_k == top_k


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_over_the_first_checkpoints_are_kept(asked, own, stages, sign, monkeypatch):
    measured = {"measurement": lambda m, b: m.net(b[0])[:, 0], "higher_is_better": True} if sign < 0 else {}

    def work(attributor, method):
        return attributor.self_influence(method) if own else attributor.score(method, QUERIES, **measured)

    positions = TracInCP().positions(asked().trajectory)
    assert len(positions) == CHECKPOINTS
    expected = work(asked(), TracInCP(checkpoints=tuple(positions[:stages])))
    fail(monkeypatch, stages * BLOCKS + 1)
    error = caught(lambda: work(asked(), TracInCP()))
    assert isinstance(error.scores, SelfScores if own else Scores)
    assert torch.equal(error.scores.values, expected.values)
    assert error.scores.checkpoints == expected.checkpoints
    assert f"summed over the first {stages} of {CHECKPOINTS} checkpoints" in error.scores.notes[0]


class Halved(TracInCP):
    def score(self, setting, queries):
        return super().score(setting, queries) / 2

    def self_influence(self, setting):
        return super().self_influence(setting) / 2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("method", "at"), [(TracInCP, 1), (Halved, 2 * BLOCKS + 1), (GradientDot, 1)])
def test_nothing_is_kept_where_nothing_is_final(asked, method, at, own, monkeypatch):
    fail(monkeypatch, at)
    error = caught(lambda: asked().self_influence(method()) if own else asked().score(method(), QUERIES))
    assert str(error) == "no such luck"
    assert not hasattr(error, "scores")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left"), ValueError("Expected more.")])
def test_any_error_keeps_its_class_and_words_and_the_next_question_is_right(asked, error, monkeypatch):
    attributor, full = asked(), asked().score(TracInCP(), QUERIES)
    with monkeypatch.context() as patch:
        small_tiles(patch)
        fail(patch, CHECKPOINTS + 2, error)
        found = caught(lambda: attributor.score(TracInCP(), QUERIES), type(error))
    assert found is error
    assert len(found.scores.train_ids) == BLOCK
    assert "`error.scores` holds" in "".join([str(found), *getattr(found, "__notes__", [])])
    assert str(found).startswith(str(type(error)(*error.args[:2])).partition(" `")[0])
    assert torch.equal(attributor.score(TracInCP(), QUERIES).values, full.values)
    assert torch.equal(attributor.self_influence(TracInCP()).values, asked().self_influence(TracInCP()).values)


@pytest.mark.parametrize("own", [False, True])
def test_examples_with_finite_gradients_are_kept(own):
    torch.manual_seed(0)
    module = Step(mlp()).double()
    items = list(TRAIN.items)
    items[5] = (items[5][0] * torch.nan, items[5][1])
    queries = [*QUERIES.items[:2], items[5], *QUERIES.items[2:]]

    def work(train, method=GradientDot()):
        attributor = Attributor(module, Items(train), batch_size=BLOCK)
        return attributor.self_influence(method) if own else attributor.score(method, Items(queries))

    error = caught(lambda: work(items), ValueError)
    assert "got NaN or infinity for training examples [5]" in str(error)
    assert error.scores.train_ids.tolist() == [i for i in range(N) if i != 5]
    if own:
        expected = work(TRAIN.items).values[error.scores.train_ids]
    else:
        expected = Attributor(module, TRAIN, batch_size=BLOCK).score(GradientDot(), QUERIES)
        expected = expected.values[:, error.scores.train_ids]
        assert error.scores.query_ids.tolist() == [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(error.scores.values, expected, rtol=1e-12, atol=1e-12)


class Distance(Step):
    """A mean over the labels beside one over the examples."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.3 * self.net(batch[0]).square().mean()


def test_nothing_is_kept_where_the_weights_of_all_examples_are_in_doubt(monkeypatch):
    small_tiles(monkeypatch)
    attributor = Attributor(Distance(mlp()).double(), classes((MISSED,), -100)(), batch_size=BLOCK)
    error = caught(lambda: attributor.score(GradientDot(), QUERIES), ValueError)
    assert str(error).startswith(f"Expected example {MISSED} to weigh")
    assert not hasattr(error, "scores")


# ---- at the end of a fit --------------------------------------------------------------------------------------------


class First(TracInCP):
    """Runs first."""


def end_of_fit(folder):
    """A fit whose scoring takes the training set as one block."""
    torch.manual_seed(0)
    influence = Influence([First(), TracInCP()], queries=QUERIES, self_influence=True, max_cost=1e9, dirpath=folder)
    run_fit(Step(mlp()).double(), DataLoader(TRAIN, BLOCK), influence, max_epochs=CHECKPOINTS)
    return influence


@pytest.mark.parametrize("own", [False, True])
def test_an_error_in_one_method_leaves_the_others_and_what_it_finished(own, tmp_path, monkeypatch):
    whole = end_of_fit(tmp_path / "whole")
    fail(monkeypatch, own * CHECKPOINTS + 2)
    with pytest.warns(UserWarning, match="`First` failed with RuntimeError") as said:
        influence = end_of_fit(tmp_path / "failed")
    results, others = (influence.self_scores, influence.scores) if own else (influence.scores, influence.self_scores)
    assert set(results) == {"TracInCP"}
    assert set(others) == {"First", "TracInCP"}
    for one, two in ((influence.scores, whole.scores), (influence.self_scores, whole.self_scores)):
        assert all(torch.equal(one[name].values, two[name].values) for name in one)
    saved = influence.run_dir / "scores" / ("First.self.partial.arrow" if own else "First.partial.arrow")
    kept = (SelfScores if own else Scores).load(saved)
    assert torch.equal(kept.values, results.partial["First"].values)
    assert any(str(saved) in str(warning.message) for warning in said)
    assert kept.checkpoints == whole.scores["First"].checkpoints[:2]
    assert kept.notes[0].startswith("Unfinished: RuntimeError ended the computation; these are the scores of 24 of 24")
    with pytest.raises(KeyError, match=r"did not run: RuntimeError: no such luck .*\.partial\['First'\]"):
        results["First"]


def test_ctrl_c_leaves_what_was_finished(tmp_path, monkeypatch):
    fail(monkeypatch, CHECKPOINTS + 1, KeyboardInterrupt())
    said = r"`First` was interrupted\. What was finished is kept as `self_scores\.partial"
    with pytest.warns(UserWarning, match="Scoring was interrupted"), pytest.warns(UserWarning, match=said):
        influence = end_of_fit(tmp_path)
    assert set(influence.scores) == {"First"}
    assert not influence.self_scores
    assert set(influence.self_scores.partial) == {"First"}
    with pytest.raises(KeyError, match="it was interrupted"):
        influence.self_scores["First"]
