"""Every curvature against the dense inverse; what cannot be inverted or does not converge says so."""

from dataclasses import dataclass

import oracles_curvature as dense
import pytest
import torch
from case import Step, both, mlp
from torch.nn import functional as F
from traced import Still, still

from lightning_influence import (
    EKFAC,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    Curvature,
    ExactGGN,
    ExactHessian,
    InfluenceFunction,
    LiSSA,
)
from lightning_influence.curvature import lissa
from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.gradients.queries import DenseQueries

torch.set_num_threads(1)
DATA = both(5)
NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


def batches(make):
    return [[part[None] for part in item] for item in make().items]


def oracle(module, matrix, diagonal, queries=None, train=None):
    """[query, train], dense."""
    train, queries = train or batches(DATA["train"]), queries or batches(DATA["queries"])
    if matrix == "hessian":
        curvature = dense.hessian(module, train, NAMES)
    else:
        curvature = dense.each_ggn(module, train, NAMES, lambda m, one: m.net(one[0]), dense.softmax_bend).mean(0)
    return dense.influence(
        dense.gradients(module, queries, NAMES), curvature, diagonal, dense.gradients(module, train, NAMES)
    )


def model():
    torch.manual_seed(0)
    return Step(mlp()).double()


def score(curvature, module=None, **options):
    return Attributor(module or model(), DATA["train"](), **options).score(
        InfluenceFunction(curvature), DATA["queries"]()
    )


INVERSES = [
    (ExactGGN(0.02), "ggn", 1e-10),
    (ExactHessian(0.5), "hessian", 1e-10),
    (ConjugateGradient(0.02, tolerance=1e-11), "ggn", 1e-8),
    (ConjugateGradient(0.5, matrix="hessian", tolerance=1e-11), "hessian", 1e-8),
    (LiSSA(0.02, tolerance=1e-9), "ggn", 1e-6),
    pytest.param(LiSSA(0.5, matrix="hessian", tolerance=1e-9), "hessian", 1e-6, marks=pytest.mark.slow),
    (Arnoldi(0.02), "ggn", 1e-8),
    pytest.param(Arnoldi(0.5, matrix="hessian", complement="drop"), "hessian", 1e-8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("curvature", "matrix", "tolerance"), INVERSES, ids=repr)
def test_every_inverse_equals_the_dense_one(curvature, matrix, tolerance):
    module = model()
    expected = oracle(module, matrix, curvature.damping)
    size = float(expected.abs().max())
    torch.testing.assert_close(score(curvature, module).values, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("complement", ["damped", "drop"])
def test_of_few_eigenvectors_the_rest_is_damped_or_dropped(complement):
    module = model()
    train, queries = batches(DATA["train"]), batches(DATA["queries"])
    curvature = dense.each_ggn(module, train, NAMES, lambda m, one: m.net(one[0]), dense.softmax_bend).mean(0)
    values, vectors = torch.linalg.eigh(curvature)
    values, vectors = values[-3:], vectors[:, -3:]
    left, right = (dense.gradients(module, ones, NAMES) for ones in (queries, train))
    inverse = vectors / (values + 0.02) @ vectors.T
    if complement == "damped":
        inverse = inverse + (torch.eye(len(curvature), dtype=torch.float64) - vectors @ vectors.T) / 0.02
    expected = left @ inverse @ right.T / len(train)
    found = score(Arnoldi(0.02, rank=3, complement=complement), module)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert found.figures["eigenvectors"] == 3


# ---- the diagonal ---------------------------------------------------------------------------------------------------


RULES = [
    # momentum 0.5 and 4 steps at 0.1: 0.1 * 4 / 0.5 = 0.8
    ({"momentum": 0.5, "weight_decay": 0.3}, 0.3 + 1 / 0.8, "sum of learning rates"),
    ({"momentum": 0.0, "dampening": 0, "weight_decay": 0.0}, 1 / 0.4, "sum of learning rates"),
]


@pytest.mark.parametrize(("group", "diagonal", "why"), RULES)
def test_the_damping_follows_the_learning_rates_and_weight_decay_comes_on_top(tmp_path, group, diagonal, why):
    module = model()
    trajectory = still(module, tmp_path, {"dampening": 0, **group}, rate=0.1, step=4)
    found = score(ExactGGN(), module, trajectory=trajectory)
    expected = oracle(module, "ggn", diagonal)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert found.figures["damping"] == pytest.approx(diagonal - group["weight_decay"])
    assert found.figures["weight_decay"] == group["weight_decay"]
    assert any(why in note for note in found.notes)


def test_ekfac_takes_a_fifth_of_the_rule(tmp_path):
    module = model()
    trajectory = still(module, tmp_path, {"dampening": 0, "momentum": 0.5, "weight_decay": 0.3}, rate=0.1, step=4)
    found = score(EKFAC(), module, trajectory=trajectory)
    assert found.figures["damping"] == pytest.approx(0.2 / 0.8)
    assert any("0.2 x 1 / (sum of learning rates" in note for note in found.notes)


@pytest.mark.parametrize(
    "curvature",
    [ExactGGN(), pytest.param(ConjugateGradient(tolerance=1e-11), marks=pytest.mark.slow)],
    ids=repr,
)
@pytest.mark.parametrize(
    ("group", "decay", "why"),
    [
        ({"betas": (0.9, 0.999), "weight_decay": 0.3, "decoupled_weight_decay": True}, 0.0, "adaptive"),
        ({"betas": (0.9, 0.999), "weight_decay": 0.3, "decoupled_weight_decay": False}, 0.3, "adaptive"),
        (None, 0.0, "no learning rates"),
    ],
)
def test_without_plain_sgd_it_is_a_tenth_of_the_mean_eigenvalue(tmp_path, curvature, group, decay, why):
    module, train = model(), batches(DATA["train"])
    matrix = dense.each_ggn(module, train, NAMES, lambda m, one: m.net(one[0]), dense.softmax_bend).mean(0)
    trajectory = None if group is None else still(module, tmp_path, group, rate=0.1, step=4)
    found = score(curvature, module, trajectory=trajectory)
    damping = found.figures["damping"]
    exact = 0.1 * float(matrix.diagonal().mean())
    assert damping == pytest.approx(exact, rel=1e-9 if isinstance(curvature, ExactGGN) else 0.2)
    expected = oracle(module, "ggn", damping + decay)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert any(f"0.1 x mean eigenvalue, since {why}" in note.replace("the optimizer is ", "") for note in found.notes)


@pytest.mark.parametrize(
    "curvature",
    [ExactGGN(0.01), ConjugateGradient(0.01, tolerance=1e-12), LiSSA(0.01, tolerance=1e-10), Arnoldi(0.01)],
    ids=repr,
)
def test_parameter_groups_have_their_own_diagonals(tmp_path, curvature):
    module = model()
    groups = [
        {"weight_decay": 0.5, "param_names": NAMES[:2], "momentum": 0, "dampening": 0},
        {"weight_decay": 0.05, "param_names": NAMES[2:], "momentum": 0, "dampening": 0},
    ]
    trajectory = still(module, tmp_path, *groups, rate=[0.1, 0.2], step=4)
    sizes = [(0.51, 36), (0.06, 21)]
    diagonal = torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in sizes])
    expected = oracle(module, "ggn", diagonal)
    found = score(curvature, module, trajectory=trajectory).values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_weight_decay_beside_a_summed_loss_is_divided_by_the_batch_size(tmp_path):
    module = Still(mlp(), lambda z, y: F.cross_entropy(z, y, reduction="sum"), decay=0.4, rate=0.05).double()
    trajectory = module.trained(DATA["train"](), tmp_path, batch_size=4, epochs=2)  # 2 batches of 4 an epoch
    found = score(ExactGGN(), module, trajectory=trajectory)
    assert found.figures["weight_decay"] == pytest.approx(0.1)
    assert found.figures["damping"] == pytest.approx(1 / (4 * 0.05 * 4))
    expected = oracle(module, "ggn", 0.1 + 1 / 0.8)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


# ---- refusals and warnings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [ExactGGN(0.0), ConjugateGradient(0.0), LiSSA(0.0), Arnoldi(0.0)], ids=repr)
def test_a_singular_curvature_without_damping_is_refused(curvature):
    with pytest.raises(ValueError, match=r"singular.*`damping="):
        score(curvature)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf"), "much", True])
def test_a_damping_that_is_no_size_is_refused(damping):
    with pytest.raises(
        ValueError, match=r"Expected `damping` to be a finite number of at least 0 or None, got .* Pass None to"
    ):
        ExactGGN(damping)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(tolerance=0), "`tolerance` to be a positive number, got 0"),
        (lambda: ConjugateGradient(max_iterations=2.5), "`max_iterations` to be a positive integer, got 2.5"),
        (lambda: ConjugateGradient(matrix="fisher"), "`matrix` to be one of 'ggn', 'hessian', got 'fisher'"),
        (lambda: LiSSA(depth=True), "`depth` to be a positive integer, got True"),
        (lambda: Arnoldi(steps=-1), "`steps` to be a positive integer, got -1"),
        (lambda: Arnoldi(rank=0), "`rank` to be a positive integer or None, got 0"),
        (lambda: Arnoldi(rank=True), "`rank` to be a positive integer or None, got True"),
        (lambda: Arnoldi(complement="kept"), "`complement` to be one of 'damped', 'drop', got 'kept'"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_that_is_too_large_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"at most 50 parameters for `ExactGGN`, got 57: .* GiB. Use `ConjugateGrad"):
        score(ExactGGN(max_parameters=50))


def test_an_indefinite_hessian_is_refused_by_conjugate_gradients_and_noted_by_the_dense_inverse():
    module = model()
    with torch.no_grad():
        module.net[2].weight.mul_(8)
    least = float(torch.linalg.eigvalsh(dense.hessian(module, batches(DATA["train"]), NAMES)).min())
    assert least < -0.1
    with pytest.raises(
        ValueError, match=r"positive definite curvature, got a Hessian that is singular or.*`matrix='ggn'`"
    ):
        score(ConjugateGradient(1e-3, matrix="hessian"), module)
    found = score(ExactHessian(1e-3), module)
    assert any("not positive definite" in note for note in found.notes)
    expected = oracle(module, "hessian", 1e-3)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    with pytest.warns(UserWarning, match=r"series diverged and was stopped at a residual .* Use `matrix='ggn'`"):
        diverged = score(LiSSA(1e-3, matrix="hessian"), module)
    assert diverged.values.isfinite().all()
    note = next(note for note in diverged.notes if "diverged" in note)
    needed = float(note.split("larger by at least ")[1].rstrip("."))
    assert -least - 1e-3 <= needed * 1.05 <= -least * 1.1
    assert any("not positive definite" in note for note in score(Arnoldi(1e-3, matrix="hessian"), module).notes)


def test_a_scale_from_power_iteration_that_is_too_small_is_replaced(monkeypatch):
    module = model()
    expected = score(LiSSA(0.01, tolerance=1e-9), module)
    found = lissa.largest_eigenvalue
    monkeypatch.setattr(lissa, "largest_eigenvalue", lambda *arguments: 0.8 * found(*arguments))
    again = score(LiSSA(0.01, tolerance=1e-9), module)
    assert not any("diverged" in note or "converge" in note for note in again.notes)
    torch.testing.assert_close(again.values, expected.values, rtol=0, atol=1e-6 * float(expected.values.abs().max()))


@pytest.mark.parametrize(
    ("curvature", "advice"),
    [
        (LiSSA(1e-9, depth=50), "Raise `depth=` or `damping=`"),
        (ConjugateGradient(1e-9, max_iterations=3), "Raise `max_iterations=` or `damping=`"),
    ],
    ids=repr,
)
def test_a_solver_that_does_not_converge_says_so_and_what_to_change(curvature, advice):
    with pytest.warns(UserWarning, match=r"did not converge: residual") as caught:
        found = score(curvature)
    assert advice in str(caught[0].message)
    assert any("did not converge" in note for note in found.notes)
    assert found.values.isfinite().all()
    assert found.figures["solver_residual"] > 1e-3


def test_solvers_report_in_the_diagnostics():
    found = score(LiSSA(0.02)).figures
    assert found["solver_residual"] <= 1e-4
    assert 5 < found["solver_iterations"] < 500
    assert found["solver_scale"] > 0.1
    assert found["damping"] == 0.02


@dataclass(frozen=True)
class Counted(ConjugateGradient):
    """Counts what is prepared and solved, and asks for few queries at once."""

    few: int | None = None

    def at_once(self, setting):
        return self.few or super().at_once(setting)

    def solve(self, prepared, queries, setting, diagonal):
        solved.append(len(queries))
        return super().solve(prepared, queries, setting, diagonal)


solved: list[int] = []


@pytest.mark.parametrize(
    ("few", "blocks"), [(None, [4]), (3, [3, 1]), pytest.param(1, [1, 1, 1, 1], marks=pytest.mark.slow)]
)
def test_directions_are_solved_once_a_block_of_queries_whatever_the_tiles(monkeypatch, few, blocks):
    expected = score(ConjugateGradient(0.02, tolerance=1e-11)).values
    monkeypatch.setattr("lightning_influence.methods.method.TILE", 12)
    solved.clear()
    found = score(Counted(0.02, tolerance=1e-11, few=few), batch_size=3)
    assert solved == blocks
    torch.testing.assert_close(found.values, expected)


def test_a_third_party_adds_a_curvature_by_one_class():
    @dataclass(frozen=True)
    class Identity(Curvature):
        def prepare(self, setting):
            return PreparedCurvature(notes=("The curvature is the identity",))

        def mean_eigenvalue(self, prepared, setting):
            return 1.0

        def solve(self, prepared, queries, setting, diagonal):
            scale = 1 / (1 + float(diagonal[0]))
            return DenseQueries({name: rows * scale for name, rows in queries.dense().items()}, setting.engine.groups)

    module = model()
    found = score(Identity(), module)
    left, right = (dense.gradients(module, batches(DATA[k]), NAMES) for k in ("queries", "train"))
    torch.testing.assert_close(found.values, left @ right.T / 1.1 / 8)
    assert "The curvature is the identity" in found.notes
