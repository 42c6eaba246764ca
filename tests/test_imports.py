"""Which files import which, the public names and the size ceilings of the package."""

import ast
from pathlib import Path

import pytest

import lightning_influence

PACKAGE = Path(lightning_influence.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"

# A room is a folder or a file at the top. It imports rooms of the floors below, never its neighbours.
FLOORS = (
    {"numerics", "files", "plotting", "loggers", "types", "checks", "compat", "timing", "progress"},
    {"module", "report", "trajectory"},
    {"scores", "data", "capture"},
    {"gradients"},
    {"setting"},
    {"curvature", "tracking", "replay"},
    {"methods", "refit"},
    {"attribution", "metrics"},
    {"callback", "conformance"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Who may know Lightning; `compat` is Lightning by another name.
LIGHTNING = {"attribution", "callback", "capture", "compat", "loggers", "module", "progress"}

MODULES = sorted(PACKAGE.rglob("*.py"), key=str)


def imports(tree):
    """Dotted names of what a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "lightning_influence." * (node.level > 0) + (node.module or "")
            if module.rstrip(".") == "lightning_influence":
                yield from (f"lightning_influence.{alias.name}" for alias in node.names)
            else:
                yield module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            relative = ast.unparse(node.args[0]).strip("f'\"").startswith(".")
            yield "lightning_influence" if relative else "lightning (by import_module)"


def wrong_imports(name, source):
    """What is wrong with the imports of the file of that name inside the package."""
    room = name.removesuffix(".py").split("/")[0]
    if room not in FLOOR:
        return [f"{name} is on no floor: add it to FLOORS in {Path(__file__).name}"]
    found = []
    for full in imports(ast.parse(source)):
        package, _, rest = full.partition(".")
        if package != "lightning_influence":
            if (
                package.split(" ")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
                and room not in LIGHTNING
            ):
                found.append(f"{name} imports {full}: only {', '.join(sorted(LIGHTNING))} may")
            continue
        target = rest.split(".")[0] if rest.split(".")[0] in FLOOR else "__init__"
        if target == "compat" and room not in LIGHTNING:
            found.append(f"{name} imports {full}: only {', '.join(sorted(LIGHTNING))} may know Lightning")
        if target == "capture" and room not in ("capture", "callback"):
            found.append(f"{name} imports {full}: scores are computed from what is on disk, without the capture")
        if target != room and FLOOR[target] >= FLOOR[room]:
            found.append(f"{name} imports {full}: it stands on the same floor or a higher one")
        if target == room == "methods" and full.split(".")[-1] not in ("method", "kinds", "retraining"):
            found.append(f"{name} imports {full}: methods do not import one another")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    wrong = wrong_imports(path.relative_to(PACKAGE).as_posix(), path.read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "progress.py",
            "from lightning_influence.attribution.attributor import Attributor",
            "it stands on the same floor or a higher one",
        ),
        ("scores/base.py", "from lightning_influence import Scores", "it stands on the same floor or a higher one"),
        (
            "scores/base.py",
            "def f():\n    import lightning_influence.data.examples",
            "it stands on the same floor or a higher one",
        ),
        ("gradients/engine.py", "import pytorch_lightning as pl", "only attribution, callback"),
        ("setting/setting.py", "from lightning_influence.compat import CallbackBase", "may know Lightning"),
        ("data/examples.py", "import_module('lightning.pytorch')", "only attribution, callback"),
        ("__init__.py", "import_module(f'{name}.x', __name__)", "only attribution, callback"),
        ("data/examples.py", "import_module('.cli', 'lightning_influence')", "same floor or a higher one"),
        ("attribution/attributor.py", "from lightning_influence.capture.store import RunWriter", "without the capture"),
        ("methods/a.py", "from lightning_influence.methods.b import B", "do not import one another"),
        ("utils.py", "", "is on no floor"),
    ],
)
def test_a_wrong_import_is_named(name, source, message):
    (wrong,) = wrong_imports(name, source)
    assert wrong.startswith(name)
    assert message in wrong


def test_floors_name_existing_files():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert set(FLOOR) == rooms


def test_public_names():
    assert sorted(lightning_influence.__all__) == [
        "Arnoldi",
        "Attributor",
        "ConjugateGradient",
        "Curvature",
        "DataShapley",
        "Decisions",
        "Downsampling",
        "EKFAC",
        "Evidence",
        "ExactGGN",
        "ExactHessian",
        "GradientDot",
        "HyDRA",
        "Influence",
        "InfluenceFunction",
        "KNNShapley",
        "LeaveOneOut",
        "LiSSA",
        "Method",
        "MissingEvidence",
        "RandomProjection",
        "Refit",
        "RepresenterPoints",
        "SOURCE",
        "Scores",
        "SelfScores",
        "TopK",
        "TracIn",
        "TracInCP",
        "TracInIdeal",
        "Trajectory",
        "read_decisions",
    ]
    missing = [name for name in lightning_influence.__all__ if not hasattr(lightning_influence, name)]
    assert not missing


@pytest.mark.parametrize("path", [*MODULES, *sorted(EXAMPLES.glob("*.py"))], ids=lambda path: path.name)
def test_sizes(path):
    source = path.read_text()
    lines = len(source.splitlines())
    assert lines <= 350, f"{path.name} has {lines} lines, 350 is the ceiling"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = body[-1].end_lineno - body[0].lineno + 1
            assert length <= 50, f"{path.name}: {node.name} has {length} lines, 50 is the ceiling"
