"""The import arrows, the public names and the size ceilings of the package."""

import ast
from pathlib import Path

import pytest

import lightning_influence

PACKAGE = Path(lightning_influence.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"

# A room is a file, or a folder as a whole. It imports rooms of the lines above it, never its neighbours.
LAYERS = (
    {"types", "compat", "timing", "whole"},
    {"numerics", "attributes", "kernels", "stage", "appearance"},
    {"module", "trajectory", "plotting", "report", "loggers", "storage", "progress"},
    {"examples", "answer", "capture"},
    {"gradients", "sources", "self_scores", "shown"},
    {"setting", "paged", "sinks", "head"},
    {"measure"},
    {"session", "scores", "replay"},
    {"tracking"},
    {"method"},
    {"curvature", "retraining"},
    {"methods", "driver", "refit"},
    {"attributor", "metrics"},
    {"end_of_fit", "conformance"},
    {"during_fit"},
    {"callback"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Who may know Lightning; `compat` is Lightning by another name.
LIGHTNING = {"compat", "module", "capture", "callback", "during_fit", "end_of_fit", "attributor", "loggers", "progress"}

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
            yield "lightning (by import_module)"


def broken_arrows(name, source):
    """What is wrong with the imports of the file of that name inside the package."""
    room = name.removesuffix(".py").split("/")[0]
    if room not in LEVEL:
        return [f"{name} is in no layer: add it to LAYERS in {Path(__file__).name}"]
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
        target = rest.split(".")[0] if rest.split(".")[0] in LEVEL else "__init__"
        if target == "compat" and room not in LIGHTNING:
            found.append(f"{name} imports {full}: only {', '.join(sorted(LIGHTNING))} may know Lightning")
        if target == "capture" and room not in ("capture", "callback"):
            found.append(f"{name} imports {full}: scores are computed from what is on disk, without the capture")
        if target != room and LEVEL[target] >= LEVEL[room]:
            found.append(f"{name} imports {full}: that arrow points up")
        if target == room == "methods":
            found.append(f"{name} imports {full}: methods do not import one another")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    broken = broken_arrows(path.relative_to(PACKAGE).as_posix(), path.read_text())
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("progress.py", "from lightning_influence.attributor import Attributor", "that arrow points up"),
        ("answer.py", "from lightning_influence import Scores", "that arrow points up"),
        ("answer.py", "def f():\n    import lightning_influence.examples", "that arrow points up"),
        ("gradients/engine.py", "import pytorch_lightning as pl", "only attributor, callback"),
        ("setting.py", "from lightning_influence.compat import CallbackBase", "may know Lightning"),
        ("examples.py", "import_module('lightning.pytorch')", "only attributor, callback"),
        ("attributor.py", "from lightning_influence.capture.store import Store", "without the capture"),
        ("methods/a.py", "from lightning_influence.methods.b import B", "do not import one another"),
        ("utils.py", "", "is in no layer"),
    ],
)
def test_a_wrong_arrow_is_named(name, source, message):
    (broken,) = broken_arrows(name, source)
    assert broken.startswith(name)
    assert message in broken


def test_layers_name_existing_files():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert set(LEVEL) == rooms


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
