"""`precision=`: gradients are those of brute force in the same precision, checked as such, and summed in float32."""

import contextlib

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, drawn
from fits import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    Downsampling,
    ExactGGN,
    ExactHessian,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    LiSSA,
    RandomProjection,
    Refit,
    RepresenterPoints,
    Scores,
    TracIn,
    TracInCP,
)
from lightning_influence.devices import roundings
from lightning_influence.gradients import tape
from lightning_influence.gradients.rules import RULES
from lightning_influence.gradients.tape import Call

LOW = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}
STEPS, WIDTH = 5, 6


def data(n=12, seed=1, dtype=torch.float32):
    g = drawn(seed)
    x = torch.randn(n, STEPS, WIDTH, generator=g).to(dtype)
    return Items(list(zip(x, torch.randint(3, (n,), generator=g), strict=True)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(WIDTH, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(WIDTH, 8), nn.Linear(8, 3), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Unruled(nn.Module):
    """A weight without a layer rule, and one that is tied."""

    def __init__(self):
        super().__init__()
        self.mixing, self.scale = nn.Parameter(0.3 * torch.randn(WIDTH, 8)), nn.Parameter(torch.ones(8))
        self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = torch.einsum("btd,dk->btk", x, self.mixing) * self.scale
        return self.one(x.tanh().mean(1)) + self.other(x.amax(1))


class Flash(nn.Module):
    """Runs in 16 bits only."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        if x.dtype is not torch.bfloat16:
            raise RuntimeError("FlashAttention only supports bf16")
        return self.last((x @ x.transpose(1, 2)).softmax(-1).to(x.dtype) @ x).mean(1)


def images(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Unflatten(1, (1, STEPS)),
        nn.Conv2d(1, 4, 3, padding=1),
        norm(4),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def of_softmax(out, y):
    return -(out.softmax(-1).log() * F.one_hot(y, 3)).sum(-1).mean()


def seeded(net, loss=F.cross_entropy):
    torch.manual_seed(0)
    return Step(net(), loss)


def brute(module, items, word):
    """[example, entries] float64: gradients of batches of one, under autocast or in another type throughout."""
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(word, torch.float32)
    twin = oracles.quiet_copy(module).to(dtype)
    cast = torch.autocast("cpu", LOW[word]) if "mixed" in (word or "") else contextlib.nullcontext()
    found = []
    for x, y in items:
        with cast:
            loss = twin.training_step((x[None].to(dtype), y[None]), 0)
        found.append(torch.autograd.grad(loss, list(twin.parameters())))
    return torch.stack([torch.cat([g.double().flatten() for g in one]) for one in found])


def products(module, train, queries, word):
    return brute(module, queries.items, word) @ brute(module, train.items, word).T


def ranks(scores):
    order = scores.argsort(1).argsort(1).double()
    return F.normalize(order - order.mean(1, keepdim=True), dim=1)


def correlation(one, other):
    return float((ranks(one) * ranks(other)).sum(1).min())


@pytest.mark.parametrize("word", ["32-true", "64-true", *LOW])
@pytest.mark.parametrize("net", [images, Attention, Unruled], ids=lambda net: net.__name__)
def test_scores_are_those_of_brute_force_in_the_same_precision(net, word):
    module, train, queries = seeded(net), data(), data(4, 2)
    scores = Attributor(module, train, precision=word).score(GradientDot(), queries)
    allowed = {"64-true": 1e-10, "32-true": 1e-5}.get(word, 1e-2)
    oracles.assert_scores(scores.values, products(module, train, queries, word), allowed)
    assert scores.settings["precision"] == word
    assert scores.values.dtype is (torch.float64 if word == "64-true" else torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any("one example at a time" in note for note in scores.notes)
    if word in LOW:
        assert correlation(scores.values, products(module, train, queries, None)) >= 0.98
        assert any(note.startswith("Gradients of 5 examples differ from those in float32 by") for note in scores.notes)


def test_a_small_cnn_keeps_its_ranks_under_autocast():
    module, train, queries = seeded(images), data(60), data(8, 2)
    scores = Attributor(module, train, precision="bf16-mixed").score(GradientDot(), queries)
    oracles.assert_scores(scores.values, products(module, train, queries, "bf16-mixed"), 3e-3)
    assert correlation(scores.values, products(module, train, queries, None)) >= 0.9989


@pytest.mark.slow
@pytest.mark.parametrize("word", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("net", "loss"), [(Recurrent, F.cross_entropy), (Unruled, of_softmax), (images, of_softmax)])
def test_other_paths_in_16_bits(net, loss, word):
    module, train, queries = seeded(net, loss), data(), data(4, 2)
    scores = Attributor(module, train, precision=word).score(GradientDot(), queries)
    oracles.assert_scores(scores.values, products(module, train, queries, word), 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_held_in_float32_for_16_bits(dtype):
    module, train, queries = seeded(Attention).to(dtype), data(dtype=dtype), data(4, 2, dtype)
    for word in ("bf16-mixed", "bf16-true", "32-true"):
        scores = Attributor(module, train, precision=word).score(GradientDot(), queries)
        oracles.assert_scores(scores.values, products(module, train, queries, word), 1e-2 if word in LOW else 1e-5)
    assert {p.dtype for p in module.parameters()} == {dtype}


# ---- words ----


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        (32, "Write '32-true'"),
        ("64", "Write '64-true'"),
        ("bf16", "Write 'bf16-mixed'"),
        ("16-true", "Small gradients are 0 in float16"),
        ("double", "Use None"),
        (True, "Use None"),
    ],
)
def test_other_words_are_refused(word, way_out):
    for make in (lambda: Attributor(seeded(Attention), data(), precision=word), lambda: Influence(precision=word)):
        with pytest.raises(ValueError, match="Expected `precision` to be None or one of '32-true'") as caught:
            make()
        assert way_out in str(caught.value)
        assert repr(word) in str(caught.value)


# ---- the Trainer's, and modules that have no choice ----


def mixed_trainer(**options):
    return pl.Trainer(**{**QUIET, "precision": "bf16-mixed", "max_epochs": 1, **options})


def test_a_trainer_in_mixed_precision_is_not_followed_but_measured():
    module, train, queries = seeded(Attention), data(), data(4, 2)
    scores = Attributor(module, train, trainer=mixed_trainer()).score(GradientDot(), queries)
    oracles.assert_scores(scores.values, products(module, train, queries, None), 1e-5)
    (note,) = [note for note in scores.notes if "was not used" in note]
    assert "Gradients of 5 examples differ from those in float32 by up to" in note
    assert "times as long" in note
    assert "Pass `precision='bf16-mixed'`" in note
    assert "precision" not in scores.settings
    silent = Attributor(module, train, trainer=mixed_trainer(), precision="32-true").score(GradientDot(), queries)
    assert not any("mixed" in note for note in silent.notes)


@pytest.mark.parametrize("half", [False, True])
def test_what_runs_in_bf16_only_is_scored_in_it(half):
    module, train, queries = seeded(Flash), data(), data(4, 2)
    module = module.bfloat16() if half else module
    trainer = None if half else mixed_trainer()
    for word in (None, "bf16-mixed", "bf16-true"):
        scores = Attributor(module, train, trainer=trainer, precision=word).score(GradientDot(), queries)
        used = word or "bf16-mixed"
        oracles.assert_scores(scores.values, products(module, train, queries, used), 2e-2)
        assert scores.settings["precision"] == used
        assert any("does not run in float32 (RuntimeError: FlashAttention" in note for note in scores.notes)
    with pytest.raises(ValueError, match="FlashAttention only supports bf16"):
        Attributor(module, train, trainer=trainer, precision="32-true").score(GradientDot(), queries)
    plain = Attributor(module.float(), train)  # nothing says how it was trained
    for _ in range(2):
        oracles.assert_scores(
            plain.score(GradientDot(), queries).values, products(module, train, queries, "bf16-mixed"), 2e-2
        )


def test_everything_is_as_before_after_an_exception():
    module = seeded(Flash).double()
    enter, default = torch.autocast.__enter__, torch.get_default_dtype()
    for word in ("32-true", "64-true", "16-mixed"):
        with pytest.raises(ValueError, match="FlashAttention"), torch.autocast("cpu", torch.bfloat16):
            Attributor(module, data(dtype=torch.float64), precision=word).score(GradientDot(), data(4, 2))
        assert torch.autocast.__enter__ is enter
        assert torch.get_default_dtype() is default
        assert not torch.is_autocast_enabled("cpu")
        assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_rounding_that_is_set_by_operation_is_off_in_full_precision_and_comes_back():
    settings = roundings()
    if not settings:
        pytest.skip("this torch has no such settings")
    module, train, queries = seeded(images), data(), data(4, 2)
    seen, before = [], [setting.fp32_precision for setting in settings]
    watched = lambda out, y: (seen.append({s.fp32_precision for s in settings}), F.cross_entropy(out, y))[1]  # noqa: E731
    module.loss = watched
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for word in ("32-true", None):
            Attributor(module, train, precision=word).score(GradientDot(), queries)
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert {"ieee"} in seen
            assert ({"ieee"} == set().union(*seen)) is (word is not None)
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


# ---- checks ----


class Faulty:
    """A layer rule with an error of a tenth."""

    def __init__(self, rule):
        self.rule, self.operands = rule, rule.operands

    def parts(self, operands, gradient, wanted, split):
        return self.rule.parts(operands, 1.1 * gradient, wanted, split)


@pytest.mark.parametrize("word", ["bf16-mixed", "bf16-true"])
def test_faults_of_the_engine_are_found_in_16_bits(word, monkeypatch):
    module, train, queries = seeded(Attention), data(), data(4, 2)
    for owner, name, fault in (
        (RULES, F.linear, Faulty(RULES[F.linear])),  # found in float32
        (Call, "in_float32", lambda call, own=Call.in_float32: scaled(own(call))),  # in 16 bits only
    ):
        with monkeypatch.context() as patched:
            (patched.setitem if isinstance(owner, dict) else patched.setattr)(owner, name, fault)
            scores = Attributor(module, train, precision=word).score(GradientDot(), queries)
        oracles.assert_scores(scores.values, products(module, train, queries, word), 1e-2)
        assert any("through torch.func" in note or "one example at a time" in note for note in scores.notes)


def scaled(call):
    return tape.replace(call, gradient=1.1 * call.gradient) if call.gradient is not None else call


class OddSum(Step):
    """In batches, the first example weighs more."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        each = F.cross_entropy(self.net(x), y, reduction="none")
        return each.mean() if len(each) < 6 else (each.sum() + each[0]) / (len(each) + 1)


def test_unequal_weights_are_refused_under_autocast():
    torch.manual_seed(0)
    module = OddSum(Attention())
    with pytest.raises(ValueError, match="to weigh in its batch as it does alone"):
        Attributor(module, DataLoader(data(), 12), precision="bf16-mixed").score(GradientDot(), data(4, 2))


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_what_float16_loses_is_measured(scale):
    module, train, queries = seeded(images, lambda out, y: scale * F.cross_entropy(out, y)), data(), data(4, 2)
    attributor = Attributor(module, train, precision="16-mixed")
    if scale < 1:
        with pytest.raises(ValueError, match=r"gradients that float16 holds.* become 0. Use 'bf16-mixed'"):
            attributor.score(GradientDot(), queries)
    else:
        assert not any("become 0" in note for note in attributor.score(GradientDot(), queries).notes)
    oracles.assert_scores(
        Attributor(module, train, precision="bf16-mixed").score(GradientDot(), queries).values,
        products(module, train, queries, "bf16-mixed"),
        1e-2,
    )


# ---- methods ----

METHODS = {
    "TracInCP": TracInCP(),
    "cosine": GradientDot(normalize="cosine"),
    "projected": TracInCP(projection=RandomProjection(8)),
    "TracIn": TracIn(),
    "EKFAC": InfluenceFunction(EKFAC(damping=0.1)),
    "ExactHessian": InfluenceFunction(ExactHessian(damping=0.5)),
    "ExactGGN": InfluenceFunction(ExactGGN(damping=0.1)),
    "newton": InfluenceFunction(ExactGGN(damping=0.1), correction="newton"),
    "ConjugateGradient": InfluenceFunction(ConjugateGradient(damping=0.1)),
    "LiSSA": InfluenceFunction(LiSSA(damping=0.5)),
    "Arnoldi": InfluenceFunction(Arnoldi(damping=0.1, steps=10)),
    "HyDRA": HyDRA(checks=0),
    "SOURCE": SOURCE(segments=2),
    "KNNShapley": KNNShapley(),
    "RepresenterPoints": RepresenterPoints(),
    "LeaveOneOut": LeaveOneOut(examples=(0, 3)),
    "Downsampling": Downsampling(n_models=6),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    influence = Influence(dirpath=tmp_path_factory.mktemp("runs"))
    module, train = seeded(lambda: images(nn.Identity)), data(18)
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[influence])
    trainer.fit(module, DataLoader(train, 6, shuffle=True))
    return module, train, influence.trajectory


def asked(fitted, name, word, folder):
    options = {"parameters": "net.6.*"} if name == "newton" else {}
    if name in ("LeaveOneOut", "Downsampling"):
        options["refit"] = Refit(dirpath=folder / str(word))
    module, train, trajectory = fitted
    trainer = pl.Trainer(**QUIET)
    return Attributor(module, train, trajectory, trainer=trainer, precision=word, **options), METHODS[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("word", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_in_16_bits_are_near_those_in_float32(fitted, name, word, tmp_path):
    one, other = (asked(fitted, name, w, tmp_path) for w in (None, word))
    full, low = (attributor.score(method, data(5, 2)).values.double() for attributor, method in (one, other))
    known = ~full.isnan()
    allowed = 0.15 if name == "KNNShapley" else 0.05
    assert torch.equal(known, ~low.isnan())
    assert float((full - low)[known].abs().max()) <= allowed * float(full[known].abs().max())
    assert other[0].cost(other[1], data(5, 2)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TracInCP", "EKFAC", "ExactGGN", "SOURCE"])
def test_self_influence_in_16_bits(fitted, name, tmp_path):
    found = []
    for word in (None, "bf16-mixed"):
        attributor, method = asked(fitted, name, word, tmp_path)
        found.append(attributor.self_influence(method).values)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05 * float(found[0].abs().max()))


def test_tracin_under_autocast_is_the_sum_of_brute_force_over_the_checkpoints(fitted):
    module, train, trajectory = fitted
    queries, expected = data(4, 2), 0.0
    for position, checkpoint in enumerate(trajectory.checkpoints[1:], 1):
        state = checkpoint.load()
        twin = oracles.quiet_copy(module, {**state.parameters, **state.buffers})
        rate = trajectory.learning_rates(position)[0]
        expected = expected + rate * products(twin, train, queries, "bf16-mixed")
    scores = Attributor(module, train, trajectory, precision="bf16-mixed").score(TracInCP(units="paper"), queries)
    oracles.assert_scores(scores.values, expected, 1e-2)


def test_a_stored_curvature_of_another_precision_is_not_used(fitted):
    module, train, trajectory = fitted
    made = lambda: {p.name for p in (trajectory.path / "curvature").glob("EKFAC-*")}  # noqa: E731
    before = made()
    for word, count in ((None, 1), ("32-true", 1), ("bf16-mixed", 2), ("bf16-mixed", 2), ("64-true", 3)):
        attributor = Attributor(module, train, trajectory, precision=word)
        attributor.score(InfluenceFunction(EKFAC(damping=0.25, seed=9)), data(2, 2))
        assert len(made() - before) == count, word


def test_scores_of_a_fit_keep_their_precision(tmp_path):
    influence = Influence([TracInCP()], data(4, 2), tmp_path, precision="bf16-mixed", max_cost=1e9, self_influence=True)
    mixed_trainer(callbacks=[influence]).fit(seeded(Attention), DataLoader(data(), 4))
    scores = influence.scores["TracInCP"]
    scores.save(tmp_path / "scores.arrow")
    assert Scores.load(tmp_path / "scores.arrow").settings["precision"] == "bf16-mixed"
    assert influence.self_scores["TracInCP"].settings["precision"] == "bf16-mixed"
    assert influence.attributor.precision == "bf16-mixed"
    assert not any("was not used" in note for note in scores.notes)


class OwnWords(nn.Module):
    """A part that calls something else ``_device`` and ``_dtype`` than Lightning does."""

    def __init__(self):
        super().__init__()
        self.linear, self._device, self._dtype = nn.Linear(3, 2), "left", "integer"

    def forward(self, x):
        return self.linear(x) * (2 if self._device == "left" else 1) * (1 if self._dtype == "integer" else 3)


@pytest.mark.parametrize("precision", [None, "bf16-true"])
def test_attributes_that_are_called_as_lightnings_are_left_alone(precision):
    torch.manual_seed(0)
    data = Items([(torch.randn(3), torch.tensor(i % 2)) for i in range(6)])
    module = Step(OwnWords())
    found = Attributor(module, DataLoader(data, 3), precision=precision).score(GradientDot(), data).values
    ones = [next(iter(DataLoader([pair]))) for pair in data.items]
    rows = oracles.rows(module, ones, [name for name, _ in module.named_parameters()])
    true = oracles.inner(rows, rows)
    assert (found - true).abs().max() <= (1e-5 if precision is None else 0.05) * true.abs().max()
