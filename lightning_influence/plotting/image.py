"""Images as they looked before they were scaled and normalised: numbers from 0 to 1."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.plotting.normalization import Normalization


class ColourWarning(UserWarning):
    """The colours of an image may be wrong."""


_ROUNDING = 0.02  # resizing and compression leave [0, 1] by as much
_PASS = "Pass `normalization=(mean, std)` here; for the logger, `Influence(album={'normalization': (mean, std)})`."
_OTHER = (
    "Expected `normalization` to bring images into [0, 1], got values from {:.2g} to {:.2g}. The colours shown may be"
    " wrong."
)
_STRETCHED = (
    "Expected images with values from 0 to 1, or the mean and standard deviation that they were normalised with, got"
    f" neither. Each image is stretched to its own range, so that colours may be wrong. {_PASS}"
)
_BYTES = 255
_BRIGHT = 50  # whole numbers up to here may be classes of pixels


def tensor_of(value: Any) -> Tensor | None:
    """A tensor, an array, a PIL image or a list of numbers as a tensor on the CPU; None for anything else."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        import numpy as np

        array = np.array(value)  # a copy: torch warns about arrays that must not be written to
        if array.dtype.kind not in "biuf":
            return None
        tensor = torch.from_numpy(array)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, (int, float)) for one in value):
        tensor = torch.tensor(value, dtype=torch.float64)
    else:
        return None
    return None if tensor.is_complex() else tensor.to_dense()


def image_of(image: Tensor, normalization: Normalization | None) -> Tensor | None:
    """[height, width] or [height, width, 3] float64 numbers from 0 to 1, or None."""
    if not image.numel():
        return None
    whole = image.dtype == torch.uint8
    image = image.double()
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (3, 4):
        image = image.movedim(0, 2)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        return None
    if image.ndim == 3:
        # A fourth channel is not transparency any more once the data were normalised.
        image = image[:, :, :1] if image.shape[2] == 1 else image[:, :, :3]
    if whole:
        image = image / 255
    elif normalization is not None:
        channels = image.shape[2] if image.ndim == 3 else 1
        # Of four channels, the first three are shown.
        mean, std = (torch.as_tensor(part, dtype=torch.float64).flatten()[:channels] for part in normalization)
        image = image * std + mean
    image = image.nan_to_num(0.0, posinf=1.0, neginf=0.0)
    low, high = image.min(), image.max()
    if normalization is not None and not whole:
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            warnings.warn(f"{_OTHER.format(low, high)} {_PASS}", ColourWarning, stacklevel=2)
        image = image.clamp(0, 1)
    elif low < 0 or high > 1:
        if image.ndim == 3 and image.shape[2] == 3:
            warnings.warn(_STRETCHED, ColourWarning, stacklevel=2)
        image = (image - low) / (high - low).clamp(min=1e-12)
    return image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image


def scale_of(images: Sequence[Tensor], found: Normalization | None) -> Normalization | None:
    """What to undo in a dataset's images, by the range of some of them.

    Args:
        images: As the dataset returns them.
        found: The mean and standard deviation that its code holds. They are of a later step, such as one on the GPU,
            where the images are still from 0 to 1 or are bytes.
    """
    known = [image.double() for image in images if image.dtype not in (torch.uint8, torch.bool) and image.ndim > 1]
    finite = [image[image.isfinite()] for image in known]
    finite = [part for part in finite if part.numel()]
    if not finite:
        return found
    low, high = min(float(part.min()) for part in finite), max(float(part.max()) for part in finite)
    if low >= 0 and high <= 1 + _ROUNDING:
        return None
    whole = all(bool((part == part.round()).all()) for part in finite)
    if low >= 0 and high > _BRIGHT and (whole or high <= _BYTES * (1 + _ROUNDING)):
        bits = max(8, math.ceil(math.log2(high + 1 - _ROUNDING * high)))  # 12 and 16 of medical and satellite images
        return 0.0, 1 / (2**bits - 1)
    ends = max(abs(low + 1), abs(high - 1))
    return (0.5, 0.5) if found is None and ends < 0.1 and low >= -1 - _ROUNDING and high <= 1 + _ROUNDING else found
