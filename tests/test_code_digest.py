"""What a module computes besides its weights is in the digest of its code, wherever it is written or held."""

import sys
import types

import pytest
import torch

from lightning_influence.module.code_digest import digest
from lightning_influence.module.code_libraries import Unclear

# The value that is written here as VALUE is 2 in one module and 3 in the other.
SOURCE = """
import collections, contextlib, enum, functools, logging, torch
import numpy as np
import pytorch_lightning as pl
import users_package
from torch import nn
from torch.nn import functional as F
from typing import NamedTuple

__package__ = "users_package"
{above}

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)
        {inside}

    def training_step(self, batch, batch_idx):
        return F.softplus(self.net(batch)) * {factor}
"""
SCALE = "def scale(x): return x * VALUE"
LAYER = "class Layer(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.{0} = VALUE\n"
READ = "    def forward(self, x): return x * self.{0}"
MADE = "class Base:\n    def __init__(self, x): self.value = x * VALUE\n"

CASES = {  # what is above the module, at the end of its `__init__`, in its step, and in a module of its package
    "module in a module": ("", "", "users_package.inner.scale(1)", SCALE),
    "constant of a module in a module": ("", "", "users_package.inner.SCALE", "SCALE = VALUE"),
    "module that is an attribute": ("", "self.code = users_package.inner", "self.code.scale(1)", SCALE),
    "import": ("def f(x):\n    import users_package.inner\n    return users_package.inner.scale(x)", "", "f(1)", SCALE),
    "import from": ("def f(x):\n    from users_package import inner\n    return inner.scale(x)", "", "f(1)", SCALE),
    "relative import": ("def f(x):\n    from .inner import scale\n    return scale(x)", "", "f(1)", SCALE),
    "like an attribute of Lightning's": (
        (LAYER + READ).format("log"),
        "self.layer = Layer()",
        "self.layer(1)",
        "",
    ),
    "method of a dict": (
        "class D(dict):\n    def value(self): return self['a'] * VALUE",
        "self.d = D(a=1)",
        "self.d.value()",
        "",
    ),
    "attribute of a list": ("class L(list): pass", "self.some = L(); self.some.k = VALUE", "self.some.k", ""),
    "method of a set": ("class S(set):\n    def value(self): return VALUE\ns = S([1])", "", "s.value()", ""),
    "property of a tuple": (
        "class T(NamedTuple):\n    a: int\n    @property\n    def b(self): return self.a * VALUE",
        "self.t = T(1)",
        "self.t.b",
        "",
    ),
    "default of a dict": ("", "self.d = collections.defaultdict(lambda: VALUE)", "self.d['a']", ""),
    "kind of number": ("class Number(float): pass", "self.number = Number(VALUE)", "self.number", ""),
    "value of an enum": ("class E(enum.Enum):\n    A = VALUE", "self.e = E.A", "self.e.value", ""),
    "method of an enum": (
        "class E(enum.Enum):\n    A = 1\n    def b(self): return VALUE",
        "self.e = E.A",
        "self.e.b()",
        "",
    ),
    "weights in no checkpoint": ("", "self.some = [nn.Parameter(torch.ones(2) * VALUE)]", "self.some[0]", ""),
    "buffers in no checkpoint": (
        "loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, VALUE]))",
        "",
        "loss(batch, batch)",
        "",
    ),
    "buffer": ("", "self.register_buffer('b', torch.ones(2) * VALUE, persistent=False)", "self.b", ""),
    "method in C": ("get = {'a': VALUE}.get", "", "get('a')", ""),
    "attribute of a function": ("def f(x): return x * f.factor\nf.factor = VALUE", "", "f(1)", ""),
    "name of a library's": ("@functools.wraps(F.softplus)\ndef f(x): return x * VALUE", "", "f(1)", ""),
    "cached": ("@functools.lru_cache\ndef f(x): return x * VALUE", "", "f(1)", ""),
    "inherited": (MADE + "class Child(Base): pass", "", "Child(1).value", ""),
    "made by another name": (MADE + "KINDS = {'a': Base}", "", "KINDS['a'](1).value", ""),
    "slots": ("class S:\n    __slots__ = ('a',)\ns = S()\ns.a = VALUE", "", "s.a", ""),
    "metaclass": (
        "class M(type):\n    @property\n    def a(cls): return VALUE\nclass C(metaclass=M): pass",
        "",
        "C.a",
        "",
    ),
    "attribute of a tensor": ("t = torch.ones(1)\nt.a = VALUE", "", "t.a", ""),
    "masked array": ("a = np.ma.masked_array([1.0, VALUE], mask=[0, 0])", "", "a.sum()", ""),
    "by any name": (
        "class P:\n    _all = {'a': VALUE}\n    def __getattr__(self, name): return self._all[name]\np = P()",
        "",
        "p.a",
        "",
    ),
}


def made(monkeypatch, value, above="", inside="", factor="1", in_package=""):
    package, inner, code = (types.ModuleType(f"users_{name}") for name in ("package", "package.inner", "code"))
    package.inner, package.__path__ = inner, []
    for module in (package, inner, code):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(in_package.replace("VALUE", str(value)), vars(inner))
    source = SOURCE.format(above=above, inside=inside, factor=factor)
    exec(source.replace("VALUE", str(value)), vars(code))
    torch.manual_seed(0)
    return code.Net()


@pytest.mark.parametrize("what", CASES)
def test_what_a_step_computes_with_is_seen(what, monkeypatch):
    first, second, other = (digest(made(monkeypatch, value, *CASES[what])) for value in (2, 2, 3))
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    "above",
    ["f = torch.ops.aten.relu", "f = collections.deque([2]).pop", "class Q(collections.deque): pass\nf = Q([2])"],
)
def test_what_cannot_be_seen_is_said(above, monkeypatch):
    with pytest.raises(Unclear):
        digest(made(monkeypatch, 2, above, factor="f"))


def test_common_steps_are_seen_through(monkeypatch):
    above = "logger = logging.getLogger('users')"
    module = made(monkeypatch, 2, above, "self.lstm = nn.LSTM(3, 3)", "logger.info('') or self.lstm(batch)[0]")
    assert digest(module) == digest(module)


def test_values_of_a_checkpoint_are_left_out(monkeypatch):
    module = made(monkeypatch, 2)
    saved = list(module.parameters())
    of_all, of_code = digest(module), digest(module, saved=saved)
    with torch.no_grad():
        saved[0].zero_()
    assert digest(module) != of_all
    assert digest(module, saved=saved) == of_code


def test_patches_of_what_layers_call_are_seen(monkeypatch):
    module, found = made(monkeypatch, 2), []
    for linear in (None, lambda x, *weights: x, lambda x, *weights: x * 2):
        with monkeypatch.context() as patched:
            if linear is not None:
                patched.setattr(torch.nn.functional, "linear", linear)
            found.append(digest(module))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, given, output: output * 2)
    found.append(digest(module))
    handle.remove()
    assert len(set(found)) == 4
    assert digest(module) == found[0]
