"""Reads the tensors and builtins in a torch file without rebuilding any other object, so that nothing is executed."""

import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

_ZIP = b"PK\x03\x04"


class Placeholder:
    """Stands for an object of any other class, or for the class itself, and ignores what a pickle does with it."""

    def __init__(self, name: str, values: Any = ()) -> None:
        self.name, self.arguments = name, values
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}, not rebuilt>"

    def __setitem__(self, key: object, value: object) -> None:
        """An entry of a class derived from dict."""

    def append(self, item: object) -> None:
        """An item of a class derived from list."""

    def extend(self, items: object) -> None:
        """Items of a class derived from list."""

    def add(self, item: object) -> None:
        """An item of a class derived from set."""


def read_plain(path: Path) -> Any:
    """The content of a file that ``torch.save`` wrote; objects that are not plain data are ``Placeholder``s.

    Tensors of files in the zip format stay on disk until they are read.

    Raises:
        FileNotFoundError: there is no file.
        pickle.UnpicklingError: ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` forbids to read the file.
        Exception: of any other class: the file is damaged, or no torch file.
    """
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        if os.getenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
            raise
    return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=_PICKLE)


# ---- what is rebuilt ------------------------------------------------------------------------------------------------


def _tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: object, hooks: object, *more: Any) -> Any:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict(), *more)


def _tensor_v3(storage: Any, offset: int, size: Any, stride: Any, grad: object, hooks: object, *more: Any) -> Any:
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, OrderedDict(), *more)


def _parameter(data: Any, *_: object) -> Any:
    return data


def _with_attributes(rebuild: Any, kind: Any, values: Any, state: object) -> Any:
    """A tensor that has Python attributes, which are dropped; tensors of other classes are not rebuilt."""
    name = kind.name if isinstance(kind, Placeholder) else repr(kind)
    plain = name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    return _called(rebuild, values) if plain else Placeholder(name)


def _ordered(*values: Any) -> Any:
    return OrderedDict(*values)


def _default(*_: object) -> dict[Any, Any]:
    return {}


def _encoded(string: object, encoding: Any = "latin1") -> Any:
    """Bytes, as pickles of protocol 2 store them."""
    if isinstance(string, str) and encoding in ("latin1", "latin-1"):
        return string.encode("latin1")
    return Placeholder("bytes")


def _numpy_scalar(kind: object, content: object = b"") -> Any:
    """A Python number in place of NumPy's."""
    if not isinstance(kind, Placeholder) or kind.name != "numpy.dtype":
        return Placeholder("numpy scalar")
    code, order = kind.arguments[0], kind.state[1] if isinstance(kind.state, tuple) else None
    kinds = {"f8": torch.float64, "f4": torch.float32, "i8": torch.int64, "i4": torch.int32, "b1": torch.bool}
    if code not in kinds or order not in ("<", "|") or not isinstance(content, bytes):
        return Placeholder("numpy scalar")
    return torch.frombuffer(bytearray(content), dtype=kinds[code]).item()


def _set(members: Any = ()) -> Any:
    return set(members)


_REBUILT: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _default,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _encoded,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}


def _called(function: object, values: Any) -> Any:
    """Call one of the functions above; a call of anything else gives a placeholder."""
    if any(function is known for known in _REBUILT.values()):
        return function(*values)  # type: ignore[operator]
    return Placeholder(function.name if isinstance(function, Placeholder) else type(function).__name__, values)


# ---- the reader -----------------------------------------------------------------------------------------------------


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's own unpickler in Python, where no instruction imports, calls or changes anything but the above."""

    stack: list[Any]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        """The function that rebuilds it, or a placeholder; nothing is imported."""
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.UntypedStorage  # compared with, not called
        return _REBUILT.get((module, name)) or Placeholder(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Refuse what was registered with ``copyreg``."""
        raise pickle.UnpicklingError("an extension of `copyreg`")

    def _instantiate(self, kind: object, values: Any) -> None:
        self.append(_called(kind, values))

    def load_reduce(self) -> None:
        """A call, or a new object."""
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """A new object with keyword arguments."""
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        """The state of an object, which only a placeholder keeps."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Tensor):
            raise pickle.UnpicklingError("a tensor in the format of PyTorch 0.3 or older")
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def load_binpersid(self) -> None:
        """A tensor's storage."""
        key = self.stack.pop()
        storage = isinstance(key, tuple) and bool(key) and key[0] in ("storage", b"storage")
        # Of a module that was pickled whole, torch would compare the source code and may write a patch.
        self.append(self.persistent_load(key) if storage else Placeholder("a module that was saved whole"))


_Unpickler.dispatch |= {
    pickle.REDUCE[0]: _Unpickler.load_reduce,
    pickle.NEWOBJ[0]: _Unpickler.load_reduce,
    pickle.NEWOBJ_EX[0]: _Unpickler.load_newobj_ex,
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.BINPERSID[0]: _Unpickler.load_binpersid,
}


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# What `torch.load` needs of a `pickle_module`.
_PICKLE: Any = SimpleNamespace(__name__="plain", Unpickler=_Unpickler, load=_load)
