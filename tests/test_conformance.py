"""Our own methods keep every promise, and each broken promise is named."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from lightning_influence import (
    EKFAC,
    Arnoldi,
    ConjugateGradient,
    DataShapley,
    Downsampling,
    Evidence,
    ExactGGN,
    ExactHessian,
    GradientDot,
    HyDRA,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    LiSSA,
    Method,
    RepresenterPoints,
    TracIn,
    TracInCP,
    TracInIdeal,
)
from lightning_influence.conformance import BrokenPromiseError, check_method

METHODS = [
    GradientDot(),
    GradientDot(normalize="cosine"),
    GradientDot(normalize="layerwise"),
    TracInCP(),
    TracInCP(units="paper"),
    TracInCP(normalize="cosine"),
    TracInCP(normalize="layerwise"),
    TracInCP(checkpoints=(-1, 0)),
    HyDRA(checks=2),
    HyDRA.during_fit(),
    HyDRA.during_fit(hessian=False, examples=(1, 4)),
    TracIn(),
    TracInIdeal(),
    RepresenterPoints(),
    KNNShapley(k=2),
    LeaveOneOut(),
    Downsampling(),
    DataShapley(budget=50),
    InfluenceFunction(EKFAC()),
    InfluenceFunction(EKFAC(labels="empirical", corrected=False), normalize="relatif"),
    InfluenceFunction(ExactGGN()),
    InfluenceFunction(ExactHessian(), normalize="relatif"),
]


SLOW = [
    InfluenceFunction(ConjugateGradient(tolerance=1e-10)),
    InfluenceFunction(ConjugateGradient(matrix="hessian", tolerance=1e-10), removal="renormalize"),
    InfluenceFunction(LiSSA(tolerance=1e-10)),
    InfluenceFunction(Arnoldi()),
    InfluenceFunction(ExactGGN(), normalize="relatif-loss"),
    InfluenceFunction(ExactGGN(), correction="newton", removal="renormalize"),
    InfluenceFunction(ExactGGN(), checkpoints=(0, -1)),
]


@pytest.mark.parametrize("method", [*METHODS, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)], ids=repr)
def test_our_methods_keep_every_promise(method):
    check_method(method)


@dataclass(frozen=True)
class Bad(GradientDot):
    def score(self, setting, queries):
        return self.spoil(super().score(setting, queries), setting, queries)

    def spoil(self, scores, setting, queries):
        return scores


@dataclass(frozen=True)
class Flipped(Bad):
    def spoil(self, scores, setting, queries):
        return -scores

    def self_influence(self, setting):
        raise NotImplementedError


@dataclass(frozen=True)
class Centred(Bad):
    def spoil(self, scores, setting, queries):
        return scores - scores.mean(0)


@dataclass(frozen=True)
class Positional(Bad):
    def spoil(self, scores, setting, queries):
        return scores * (1 + torch.arange(len(setting.ids)))


CALLS = itertools.count(1)


@dataclass(frozen=True)
class Random(Bad):
    def spoil(self, scores, setting, queries):
        return scores + 1e-3 * next(CALLS)


@dataclass(frozen=True)
class NaN(Bad):
    def spoil(self, scores, setting, queries):
        return scores.clone().fill_(torch.nan)


@dataclass(frozen=True)
class WrongSelf(GradientDot):
    def self_influence(self, setting):
        return 2 * super().self_influence(setting)


@dataclass
class Settable(Method):
    size: int = 1

    def score(self, setting, queries):
        return setting.zeros(queries)


@dataclass(frozen=True)
class NeedsAField(GradientDot):
    needs: Evidence = Evidence.FINAL_WEIGHTS


class Plain(Method):
    def score(self, setting, queries):
        return setting.zeros(queries)


@pytest.mark.parametrize(
    ("method", "promise"),
    [
        (Flipped(), "a duplicate of the query is a proponent"),
        (Centred(), "the scores of a query do not depend on the other queries"),
        (Positional(), "permuting the training set permutes columns|scores do not depend on the batch size"),
        (Random(), "two calls agree"),
        (WrongSelf(), "self-influence is the score of an example on itself"),
        (Settable(), "a method is a frozen record"),
        (NeedsAField(), "`needs` is no hyper-parameter"),
        (Plain(), "a method is a dataclass"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_a_broken_promise_is_named(method, promise):
    with pytest.raises(BrokenPromiseError, match=f"Promise broken: ({promise})"):
        check_method(method)


def test_scores_that_are_not_finite_are_refused_by_the_driver():
    with pytest.raises(ValueError, match="Expected finite gradients"):
        check_method(NaN())


@dataclass(frozen=True)
class Trusting(Method):
    """Claims to need checkpoints and would not mind their absence."""

    needs = Evidence.BATCH_ORDER | Evidence.FINAL_WEIGHTS

    def score(self, setting, queries):
        return setting.zeros(queries)


def test_missing_evidence_must_be_refused():
    with pytest.raises(BrokenPromiseError, match="missing evidence is refused"):
        check_method(Trusting())
