"""Which files import which, the public names and the size ceilings of the package."""

import ast
import re
from pathlib import Path

import pytest

import lightning_influence

PACKAGE = Path(lightning_influence.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"

# A room is a folder or a file at the top. It imports rooms of the floors below, never its neighbours.
FLOORS = (
    {"types", "checks", "devices", "hints", "wording"},
    {"files", "plotting", "loggers", "compat", "timing", "progress", "processes"},
    {"numerics"},
    {"module", "report", "trajectory"},
    {"scores", "data", "capture"},
    {"gradients"},
    {"setting"},
    {"curvature", "tracking", "replay"},
    {"methods", "refit"},
    {"attribution", "metrics"},
    {"callback"},
    {"__init__", "conformance"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What methods may import of their own room; HyDRA is one method in two classes.
SHARED_BY_METHODS = ("method", "kinds", "segment_product", "retraining", "hydra_during_fit")

# Who may know Lightning; `compat` is Lightning by another name.
LIGHTNING = {"attribution", "callback", "capture", "compat", "conformance", "loggers", "module", "progress"}

MODULES = sorted(PACKAGE.rglob("*.py"), key=str)

# Names that are those of our classes, rooms or files, but stand for objects of others, which may be `Any`.
FOREIGN = {
    "module": "the LightningModule",
    "queries": "a user's Dataset, DataLoader or word for one",
    "data": "a user's Dataset or DataLoader",
    "example": "one item of a user's Dataset",
    "loggers": "the Trainer's",
    "outputs": "what `training_step` returned",
    "types": "of torch's `__torch_function__`",
    "weights": "what a user's `training_step` made of them",
    "drawn": "what a sampler yields",
    "optimizers": "the Trainer's",
}

# What `Any` hides today, and why it is not mended yet.
KNOWN_ANY = {
    ("callback/arguments.py", "methods"): "what a user passed, before it is checked",
    ("curvature/damping.py", "reduction"): "a word or a number, as `Trajectory.exposure` takes it",
}


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
        if target == room == "methods" and full.split(".")[-1] not in SHARED_BY_METHODS:
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


def snake_case(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def members(node):
    """Methods, fields and attributes of a class."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            yield part.name
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            yield part.attr


CLASSES = [
    (path.relative_to(PACKAGE).as_posix(), node.name, frozenset(members(node)))
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef)
]
OWN_NAMES = {snake_case(name) for _, name, _ in CLASSES if not name.startswith("_")}
OWN_NAMES |= {part.removesuffix(".py") for path in MODULES for part in path.relative_to(PACKAGE).parts}


def held_as_any(scope):
    """Names of parameters, fields and attributes annotated `Any` or `Any | None` inside a function or class."""
    for node in ast.walk(scope):
        if isinstance(node, ast.arguments):
            yield from (arg.arg for arg in (*node.posonlyargs, *node.args, *node.kwonlyargs) if is_any(arg.annotation))
        elif isinstance(node, ast.AnnAssign) and is_any(node.annotation):
            yield getattr(node.target, "id", None) or node.target.attr


def is_any(annotation):
    return annotation is not None and ast.unparse(annotation) in ("Any", "Any | None")


def read_of(name, scope):
    """Attributes that are read of a variable or attribute of that name, whatever its leading underscore."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            if owner is not None and owner.strip("_") == name.strip("_"):
                yield node.attr


def back_doors(file, source):
    """Names that are `Any` and hold an object of this package: {name: why}."""
    floor, found = FLOOR[file.removesuffix(".py").split("/")[0]], {}
    for scope in ast.walk(ast.parse(source)):
        if not isinstance(scope, (ast.FunctionDef, ast.ClassDef)):
            continue
        for name in held_as_any(scope):
            plain, read = name.strip("_"), set(read_of(name, scope))
            if {plain, plain.removesuffix("s")} & OWN_NAMES and plain not in FOREIGN:
                found[plain] = "has the name of a class, a room or a file of this package"
            for home, owner, has in CLASSES:
                if len(read) > 1 and read <= has and FLOOR[home.removesuffix(".py").split("/")[0]] >= floor:
                    found[plain] = f"is read like a `{owner}` of {home}: {', '.join(sorted(read))}"
    return found


def test_any_hides_no_object_of_this_package():
    found = {
        (file, name): why
        for path in MODULES
        for file in [path.relative_to(PACKAGE).as_posix()]
        for name, why in back_doors(file, path.read_text()).items()
    }
    new = [f"{file}: `{name}: Any` {why}" for (file, name), why in found.items() if (file, name) not in KNOWN_ANY]
    assert not new, "\n".join(new)
    mended = KNOWN_ANY.keys() - found.keys()
    assert not mended, f"{sorted(mended)} are mended: take them out of KNOWN_ANY"


HOLDS = """
class Part:
    def __init__(self, {name}: Any, trainer: Any) -> None:
        self._held, self._trainer = {name}, trainer
        self._steps = trainer.global_step, trainer.max_epochs

    def run(self, owner: {kind}):
        return owner.methods, owner.queries, self._trainer.loggers
"""


@pytest.mark.parametrize(
    ("file", "name", "kind", "expected"),
    [
        ("callback/end_of_fit.py", "influence", "str", {"influence": "has the name of a class"}),
        ("setting/setting.py", "models", "str", {"models": "has the name of a class, a room or a file"}),
        ("setting/setting.py", "_attributor", "str", {"attributor": "has the name of a class"}),
        ("setting/setting.py", "thing", "Any", {"owner": "is read like a `"}),
        ("setting/setting.py", "thing", "Any | None", {"owner": "is read like a `"}),
        ("setting/setting.py", "module", "str", {}),
    ],
)
def test_a_back_door_is_named(file, name, kind, expected):
    found = back_doors(file, HOLDS.format(name=name, kind=kind))
    assert found.keys() == expected.keys()
    assert all(found[key].startswith(start) for key, start in expected.items())


def test_a_back_door_in_a_field_is_named():
    assert back_doors("scores/base.py", "class Part:\n    influence: Any = None").keys() == {"influence"}


def test_floors_name_existing_files():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert set(FLOOR) == rooms


def test_public_names():
    assert sorted(lightning_influence.__all__) == [
        "Arnoldi",
        "Attributor",
        "ConjugateGradient",
        "Cost",
        "Curvature",
        "DataShapley",
        "Decisions",
        "Downsampling",
        "EKFAC",
        "Evidence",
        "ExactGGN",
        "ExactHessian",
        "ForwardOnly",
        "GradientDot",
        "GradientProduct",
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
        "Retraining",
        "SOURCE",
        "Scores",
        "SelfScores",
        "TopK",
        "TracIn",
        "TracInCP",
        "TracInIdeal",
        "Trajectory",
        "WholeRun",
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
