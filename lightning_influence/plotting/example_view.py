"""What to show of an example: an image, a text, a row of numbers or a curve, and its class."""

import contextlib
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from lightning_influence.plotting.image import image_of, scale_of, tensor_of
from lightning_influence.plotting.normalization import Normalization, inwards, normalization_of
from lightning_influence.types import LABELS, labels_in
from lightning_influence.wording import counted

Classes: TypeAlias = Sequence[str] | Mapping[int, str]
"""Names of the classes, by number."""

_Options = TypeVar("_Options", bound="ViewOptions")
_SOME = 8  # images by which the range of all is judged
_ONLY_IMAGES = (
    "`normalization` changes images only, got texts or rows of numbers, which are shown as they are. Leave it out, or "
    "pass `render=`, which may return the row in its own units: `lambda example: example[0] * std + mean`."
)
_ROW = 40  # the most numbers that are shown one by one; more are a curve
_NAME = 200  # characters of the name of a class
_TEXTS = ("text", "sentence", "content", "document", "review", "question", "premise")
_FIRST_OF_TWO = ("question", "premise")


@dataclass(frozen=True)
class ViewOptions:
    """How an example is turned into something to show.

    Args:
        render: In place of the built-in view. Called with an example, it returns what to show of it: a text, an image,
            a vector or a dict of them. One that takes (axes, example) draws into the axes of a figure.
        labels: Names of the classes, by number; by default those of `classes_of`.
        columns: Names of the numbers in a table's row.
        normalization: Mean and standard deviation to undo in images; by default what `normalization_of` finds.
    """

    render: Callable[..., Any] | None = None
    labels: Classes | None = None
    columns: Sequence[str] | None = None
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        """Raises TypeError for a string in the place of names."""
        for name, given in (("labels", self.labels), ("columns", self.columns)):
            if isinstance(given, str):
                raise TypeError(f"Expected `{name}` to be a list of names, got {given!r}. Write `{name}=[{given!r}]`.")

    def suited_to(self: _Options, *datasets: Any) -> _Options:
        """These options, with the normalisation and the class names that datasets have where none were given."""
        known = [dataset for dataset in datasets if dataset is not None]
        undone = self.normalization
        if undone is None:
            undone = next((found for one in known if (found := normalization_of(one)) is not None), None)
            images = [image for one in known for image in _some_images(one)]
            undone = scale_of(images, undone) if images or self.render is not None else None
        elif self.render is None and any(_some_rows(one) for one in known):
            warnings.warn(_ONLY_IMAGES, stacklevel=2)
        return replace(self.named_by(*known), normalization=undone)

    def named_by(self: _Options, *datasets: Any) -> _Options:
        """These options, with the class names of the first dataset that has any where none were given."""
        names = next((found for one in datasets if (found := classes_of(one))), None)
        return self if names is None or self.labels is not None else replace(self, labels=dict(enumerate(names)))

    @property
    def draws(self) -> bool:
        """Whether `render` draws into axes."""
        if self.render is None:
            return False
        try:
            signature(self.render).bind(None)
        except TypeError:
            return True
        except ValueError:  # of a builtin
            return False
        return False

    def look(self, example: Any) -> "Look":
        """What to show of an example, by `render` if that returns it.

        Raises:
            ValueError: The example holds nothing that can be shown.
        """
        if isinstance(example, Look):
            return example
        if self.render is None:
            return look_at(example, self.columns, self.normalization)
        look = Look("nothing", None) if self.draws else look_at(self.render(example), self.columns, self.normalization)
        if look.label is not None:
            return look
        with contextlib.suppress(ValueError):
            return look._replace(label=look_at(example, self.columns, self.normalization).label)
        return look

    def filled(self: _Options, other: "ViewOptions") -> _Options:
        """These options, with those of another where none were given."""
        names = [f.name for f in fields(ViewOptions) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(other, name) for name in names})

    def class_of(self, label: Any) -> str:
        """The name of a class, or its number."""
        return self.name_of(label).removeprefix("label ")

    def name_of(self, label: Any) -> str:
        """The name of a class, or "label" and its number.

        Raises:
            ValueError: A list of `labels` was given that ends before this class.
        """
        names = self.labels
        if names is None or isinstance(names, Mapping) or isinstance(label, str):
            return class_name(label, names)
        if float(label).is_integer() and label >= len(names):
            raise ValueError(
                f"Expected `labels` to have a name for each class, got {len(names)} for class {label:g}. "
                "Name them all, or some in a dict: `labels={0: 'name'}`."
            )
        return class_name(label, names)


class Look(NamedTuple):
    """What is shown of one example.

    The type of `value` depends on `kind`. ``"image"``: a [height, width] or [height, width, 3] tensor between 0 and 1.
    ``"text"``: a string. ``"row"``: pairs of a name (may be empty) and a text. ``"curve"``: a [step] tensor.
    ``"nothing"``: None. `label` is a number or a name, where the example has one.
    """

    kind: str
    value: Any
    label: int | float | str | None = None


def look_at(example: Any, columns: Sequence[str] | None = None, normalization: Normalization | None = None) -> Look:
    """Find what to show of an example.

    It may be an image (a [C, H, W], [H, W, C] or [H, W] tensor, array or PIL image), a text, a vector (a table's row,
    or a curve where it is longer than 40 and has no `columns`), or a tuple or dict that holds one of these and a label.
    A dict with neither image nor text is a row.

    Args:
        example: One item of a Dataset.
        columns: Names of the numbers in a table's row.
        normalization: Undone in images. Without it, images outside [0, 1] are rescaled to it, integers by 1 / 255.

    A warning says where the colours of an image may be wrong.

    Raises:
        ValueError: The example holds nothing that can be shown.
    """
    if example is None:
        return Look("nothing", None)
    content, label = _parts(example)
    if isinstance(content, str):
        return Look("text", printable(content), label)
    if isinstance(content, _Cells):
        return Look("row", [(printable(name), printable(text)) for name, text in content], label)
    tensor = tensor_of(content)
    if tensor is not None and tensor.ndim == 1 and tensor.numel():
        if columns is None and tensor.numel() > _ROW:
            return Look("curve", tensor.double(), label)
        names = list([""] * tensor.numel() if columns is None else columns)
        if len(names) != tensor.numel():
            raise ValueError(
                f"Expected `columns` to have {counted(tensor.numel(), 'name')}, got {len(names)}. Name each number."
            )
        return Look(
            "row", [(printable(str(n)), _number(v)) for n, v in zip(names, tensor.tolist(), strict=True)], label
        )
    image = None if tensor is None else image_of(tensor, normalization)
    if image is None:
        raise ValueError(
            "Expected an image of shape [C, H, W], [H, W, C] or [H, W] or a text, a vector or a dict of them to show, "
            f"got {type(content).__name__} of shape {list(getattr(content, 'shape', ()))}. Pass `render=`."
        )
    return Look("image", image, label)


class _Cells(list):
    """Names and texts of a row, already formatted."""


def _some_rows(dataset: Any) -> bool:
    """Whether the first example of a dataset is a text or a row, in which no mean and standard deviation are undone."""
    with contextlib.suppress(Exception):
        return look_at(dataset[0]).kind in ("text", "row", "curve")
    return False


def _some_images(dataset: Any) -> list[Tensor]:
    """Images of examples from all over a dataset, as it returns them."""
    found = []
    with contextlib.suppress(Exception):  # what cannot be read or shown tells of itself when it is asked for
        for i in range(0, len(dataset), -(-len(dataset) // _SOME)):
            tensor = tensor_of(_parts(dataset[i])[0])
            if tensor is not None and tensor.ndim > 1:
                found.append(tensor)
    return found


def classes_of(dataset: Any) -> list[str] | None:
    """Names of the classes of a dataset, or of one that it wraps: `classes`, `class_names`, or Hugging Face's."""
    for owner in inwards(dataset):
        features = getattr(owner, "features", None)
        features = features if isinstance(features, Mapping) else {}
        named = (getattr(features[name], "names", None) for name in LABELS if name in features)
        for names in (getattr(owner, "classes", None), getattr(owner, "class_names", None), *named):
            if isinstance(names, (list, tuple)) and names:
                first = [one[0] if isinstance(one, (list, tuple)) and one else one for one in names]  # synonyms
                if all(isinstance(one, str) for one in first):
                    return first
    return None


def class_name(label: Any, labels: Classes | None = None) -> str:
    """The name of a class where there is one, otherwise its number."""
    if isinstance(label, str):
        return printable(label, _NAME)
    if labels is not None and float(label).is_integer():
        number = int(label)
        if number in (labels if isinstance(labels, Mapping) else range(len(labels))):
            return printable(str(labels[number]), _NAME)
    return f"label {_number(label)}"


def printable(text: str, most: int | None = None) -> str:
    """The text without control characters and lone surrogates, which no file, figure or terminal takes.

    Args:
        text: anything.
        most: characters, beyond which it is cut.
    """
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in text)


def plain(value: Any) -> Any:
    """A number or a text, also from a tensor or array of one element; None for anything else."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return value if isinstance(value, (bool, int, float, str)) else None


def label_of(example: Any) -> Any:
    """The class of an example as a number or a text, also where it is one-hot, or its target; None without."""
    found = example[-1] if _pair(example) else labels_in(example)
    numbers = None if found is None else tensor_of(found)
    if numbers is None or numbers.ndim == 0 or (len(example) > 2 and not isinstance(example, Mapping)):
        return plain(found)  # of three parts, the second may be a mask
    if numbers.numel() == 1:
        return numbers.item()
    one_hot = numbers.ndim == 1 and bool((((numbers == 0) | (numbers == 1)).all()) and numbers.sum() == 1)
    return int(numbers.argmax()) if one_hot else None


def _pair(example: Any) -> bool:
    """Whether an example is texts, such as a premise and a hypothesis, and a class."""
    return (
        isinstance(example, (tuple, list))
        and len(example) > 2
        and all(isinstance(part, str) for part in example[:-1])
        and not isinstance(example[-1], str)
    )


def fitting(cells: Sequence[tuple[str, str]], most: int) -> tuple[list[tuple[str, str]], int]:
    """The cells of a row that fit, and how many are left out: first zeros, if most are, as of one-hot columns."""
    if len(cells) <= most:
        return list(cells), 0
    telling = [cell for cell in cells if cell[1] not in ("0", "False")]
    shown = (telling if 2 * len(telling) <= len(cells) else list(cells))[:most]
    return shown, len(cells) - len(shown)


def _parts(example: Any) -> tuple[Any, Any]:
    """The content of an example to show, and its label."""
    label = label_of(example)
    if isinstance(example, Mapping):
        return _of_mapping({key: value for key, value in example.items() if key not in LABELS}), label
    if isinstance(example, (tuple, list)):
        content = "\n\n".join(example[:-1]) if _pair(example) else example[0] if example else None
        return (_of_mapping(content) if isinstance(content, Mapping) else content), label
    return example, label


def _of_mapping(entries: Mapping[Any, Any]) -> Any:
    """The entry that is an image or a text, otherwise all entries as a row."""
    for value in entries.values():
        tensor = tensor_of(value)
        if tensor is not None and tensor.ndim > 1 and image_of(tensor, None) is not None:
            return value
    texts = [key for key, value in entries.items() if isinstance(value, str)]
    named = next((key for key in _TEXTS if key in texts), texts[0] if len(texts) == 1 == len(entries) else None)
    if named in _FIRST_OF_TWO and len(texts) > 1:
        return _row({key: entries[key] for key in texts})
    if named is not None:
        return entries[named]
    if len(entries) == 1 and plain(only := next(iter(entries.values()))) is None:
        return only
    return _row(entries)


def _row(entries: Mapping[Any, Any]) -> Any:
    cells = _Cells()
    for name, value in entries.items():
        one, tensor = plain(value), tensor_of(value)
        if one is not None:
            cells.append((str(name), one if isinstance(one, str) else _number(one)))
        elif tensor is not None and tensor.ndim == 1:
            shown = " ".join(_number(v) for v in tensor[:_ROW].tolist())
            cells.append((str(name), shown + " …" * (tensor.numel() > _ROW)))
    return cells or entries


def _number(value: Any) -> str:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < 10**15):
        return str(value)
    return f"{value:.4g}"
