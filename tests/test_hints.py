"""What is said about a keyword that a public class or function does not take, and what stays as it was."""

import copy
import inspect
import pickle
from enum import Flag

import pytest
import torch

import lightning_influence
from lightning_influence import (
    EKFAC,
    Attributor,
    Decisions,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    Method,
    RandomProjection,
    Refit,
    Scores,
    SelfScores,
    TracInCP,
    Trajectory,
    read_decisions,
)
from lightning_influence.metrics import evaluate, subset_removal
from lightning_influence.processes import Processes

PUBLIC = [
    one
    for one in (getattr(lightning_influence, name) for name in lightning_influence.__all__)
    if isinstance(one, type) and one.__init__ is not object.__init__ and not issubclass(one, (tuple, Exception, Flag))
]


ATTRIBUTOR = object.__new__(Attributor)
ATTRIBUTOR.processes = Processes()
SCORES = Scores(torch.eye(2), None, torch.arange(2), torch.arange(2), method="m")
OWN = SelfScores(torch.arange(2), torch.ones(2), method="m")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (
            lambda: ATTRIBUTOR.score(None, topk=5),
            "an argument of `Attributor.score`, got `topk`. Did you mean `top_k`?",
        ),
        (lambda: ATTRIBUTOR.score(None, k=5), "got `k`. Did you mean `top_k`?"),
        (lambda: ATTRIBUTOR.score(None, query=[]), "got `query`. Did you mean `queries`?"),
        (lambda: ATTRIBUTOR.score(None, val_dataset=[]), "Did you mean `queries`?"),
        (lambda: ATTRIBUTOR.score([], method=1), "Expected `method` of `Attributor.score` once, got it by posit"),
        (lambda: ATTRIBUTOR.self_influence(1, queries=2), "got `queries`. It takes `method`, `path`."),
        (lambda: ATTRIBUTOR.group(1, indices=[1]), "Did you mean `ids`?"),
        (lambda: Attributor(model=1), "an argument of `Attributor`, got `model`. Did you mean `module`?"),
        (lambda: Attributor(1, device="cpu"), "Did you mean `trainer`?"),
        (lambda: Influence(method=TracInCP()), "an argument of `Influence`, got `method`. Did you mean `methods`?"),
        (lambda: Influence(topk=3), "Did you mean `top_k`?"),
        (lambda: SCORES.proponents(top_k=3), "an argument of `Scores.proponents`, got `top_k`. Did you mean `k`?"),
        (lambda: SCORES.proponents(n=3), "Did you mean `k`?"),
        (lambda: SCORES.plot(index=0), "Did you mean `query`?"),
        (lambda: SCORES.plot(class_names=[]), "Did you mean `labels`?"),
        (lambda: SCORES.base_ids(k=1), "It takes none."),
        (lambda: SCORES.save("x", colums=[]), "an argument of `Scores.save`, got `colums`. Did you mean `columns`?"),
        (lambda: OWN.save("x", show=print), "an argument of `SelfScores.save`, got `show`. Did you mean `render`?"),
        (lambda: Scores.load(file="x"), "an argument of `Scores.load`, got `file`. Did you mean `path`?"),
        (lambda: OWN.top(n=3), "an argument of `SelfScores.top`, got `n`. Did you mean `k`?"),
        (lambda: Trajectory.load(folder="x"), "Did you mean `dirpath`?"),
        (lambda: Trajectory.from_checkpoints([], lr=0.1), "Did you mean `learning_rates`?"),
        (lambda: Refit(model=1), "an argument of `Refit`, got `model`. Did you mean `make_module`?"),
        (lambda: Refit().bank([], num_subsets=4), "Did you mean `n_subsets`?"),
        (lambda: evaluate(SCORES, banks=1), "an argument of `evaluate`, got `banks`. Did you mean `bank`?"),
        (lambda: subset_removal(SCORES, n=1), "Did you mean `k`?"),
        (lambda: read_decisions(file="x"), "Did you mean `path`?"),
        (lambda: TracInCP(normalise="cosine"), "an argument of `TracInCP`, got `normalise`. Did you mean `normalize`?"),
        (lambda: InfluenceFunction(hvp=EKFAC()), "Did you mean `curvature`?"),
        (lambda: InfluenceFunction(EKFAC(), curvature=EKFAC()), "Expected `curvature` of `InfluenceFunction` once"),
        (lambda: EKFAC(lam=1), "an argument of `EKFAC`, got `lam`. Did you mean `damping`?"),
        (lambda: HyDRA(max_drif=1), "an argument of `HyDRA`, got `max_drif`. Did you mean `max_drift`?"),
        (lambda: HyDRA.during_fit(mode=1), "an argument of `HyDRA.during_fit`, got `mode`. It takes"),
        (lambda: RandomProjection(dims=8), "Did you mean `dim`?"),
        (lambda: KNNShapley(n_neighbours=3), "It takes `k`, `features`, `labels`."),
    ],
)
def test_a_wrong_keyword_is_told_with_what_was_meant(call, hint):
    with pytest.raises(TypeError) as error:
        call()
    assert hint in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_public_class_says_what_it_takes(kind):
    with pytest.raises(TypeError, match=f"of `{kind.__name__}`, got `nonsense_`|abstract"):
        kind(nonsense_=1)


def test_signatures_copies_and_other_errors_are_as_they_were():
    assert list(inspect.signature(Attributor.score).parameters)[:4] == ["self", "method", "queries", "top_k"]
    assert list(inspect.signature(InfluenceFunction).parameters)[:1] == ["curvature"]
    assert list(inspect.signature(Influence).parameters)[:2] == ["methods", "queries"]
    assert inspect.signature(Trajectory.load) == inspect.signature(Trajectory.load.__wrapped__.__get__(Trajectory))
    for one in (TracInCP(normalize="cosine"), InfluenceFunction(EKFAC(damping=0.1)), RandomProjection(dim=4)):
        assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert Influence.on_train_end.__wrapped__.__qualname__ == "Influence.on_train_end"  # guarded, once
    assert not hasattr(Influence.setup, "__wrapped__")
    with pytest.raises(TypeError, match="Expected `ids` to be whole"):
        SCORES.group(ids=[True, False])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'queries'"):
        ATTRIBUTOR.score(TracInCP())
    assert Decisions(train_ids=torch.arange(1), base_ids=None).base_ids is None


def test_a_method_of_somebody_else_may_take_what_it_likes():
    class Own(Method):
        def __init__(self, **options):
            self.options = options

        def score(self, setting, queries):
            return None

    assert Own(anything=1).options == {"anything": 1}
