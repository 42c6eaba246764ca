"""`import lightning_influence` loads none of its modules; a name loads what it needs when it is first used."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_influence

ROOT = Path(__file__).parents[1]


def loaded_after(statement):
    """The modules of the package that a new interpreter has loaded after a statement, and `torch` where it has."""
    show = "import sys; print(*(m for m in sys.modules if m == 'torch' or m.split('.')[0] == 'lightning_influence'))"
    command = [sys.executable, "-c", f"{statement}\n{show}"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_import_loads_no_module_of_the_package_and_not_torch():
    assert loaded_after("import lightning_influence; lightning_influence.__version__, dir(lightning_influence)") == {
        "lightning_influence"
    }


def test_a_name_loads_what_it_needs_and_no_more():
    loaded = loaded_after("from lightning_influence import Scores, TracInCP")
    assert {"lightning_influence.scores", "lightning_influence.methods.tracin_cp"} <= loaded
    assert loaded.isdisjoint(f"lightning_influence.{room}" for room in ("capture", "callback", "curvature", "refit"))


def test_the_help_of_the_command_line_loads_no_torch():
    loaded = loaded_after("from lightning_influence.cli import _parser; _parser(['--help']).format_help()")
    assert loaded == {"lightning_influence", "lightning_influence.cli"}


@pytest.mark.slow
def test_a_star_import_brings_every_public_name():
    names = "from lightning_influence import *; import lightning_influence as li; assert set(li.__all__) <= set(dir())"
    assert "lightning_influence.callback.influence" in loaded_after(names)


@pytest.mark.parametrize("name", lightning_influence.__all__)
def test_every_public_name_is_found_and_pickled(name):
    value = getattr(lightning_influence, name)
    assert value.__name__ == name
    assert name in dir(lightning_influence)
    assert pickle.loads(pickle.dumps(value)) is value


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(lightning_influence.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.orelse == [])
    seen = {a.name: node.module.partition(".")[2] for node in block.body for a in node.names}
    assert seen == lightning_influence._MODULES
    assert sorted(seen) == sorted(lightning_influence.__all__)


def test_submodules_are_attributes():
    rooms = "gradients", "setting", "report", "metrics", "conformance"  # in this order none loads a later one
    used = [f"assert {m!r} not in sys.modules; {m}.__doc__" for m in map("lightning_influence.{}".format, rooms)]
    loaded = loaded_after("; ".join(["import sys, lightning_influence", *used]))
    assert loaded >= {f"lightning_influence.{room}" for room in rooms}


def test_an_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="module 'lightning_influence' has no attribute 'Influenza'"):
        _ = lightning_influence.Influenza
    with pytest.raises(ImportError, match="Influenza"):
        from lightning_influence import Influenza  # noqa: F401
    assert not hasattr(lightning_influence, "__main__")


def test_a_missing_dependency_is_not_mistaken_for_an_unknown_attribute():
    without = "import sys; sys.modules['pyarrow'] = None; import lightning_influence"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        loaded_after(f"{without}; hasattr(lightning_influence, 'trajectory')")
    assert "ModuleNotFoundError: import of pyarrow halted" in failed.value.stderr


def test_the_version_is_that_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == lightning_influence.__version__


def test_the_walk_in_the_docstring_passes_at_most_seven_folders():
    stops = re.findall(r"^(\d)\. ``(\w+)``:", lightning_influence.__doc__, re.MULTILINE)
    assert [int(number) for number, _ in stops] == list(range(1, len(stops) + 1))
    assert 1 < len(stops) <= 7
    for _, room in stops:
        assert Path(importlib.import_module(f"lightning_influence.{room}").__file__).name == "__init__.py"
