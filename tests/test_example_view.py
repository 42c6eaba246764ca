"""What is shown of examples, whatever form they have."""

import struct
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_influence.plotting.example_view import Look, ViewOptions, class_name, look_at, plain
from lightning_influence.plotting.normalization import normalization_of
from lightning_influence.report.album import image_of_png


@pytest.mark.parametrize(
    ("example", "look"),
    [
        ("words", Look("text", "words")),
        (("words", 1), Look("text", "words", 1)),
        ({"idx": 3, "text": "words", "label": torch.tensor(2)}, Look("text", "words", 2)),
        ({"note": "words"}, Look("text", "words")),
        ({"age": 3, "name": "x", "target": 0.5}, Look("row", [("age", "3"), ("name", "x")], 0.5)),
        ({"ids": torch.arange(3), "n": 2}, Look("row", [("ids", "0 1 2"), ("n", "2")])),
        (({"age": 3}, np.int64(4)), Look("row", [("age", "3")], 4)),
        (([1.5, 2], "cat"), Look("row", [("", "1.5"), ("", "2")], "cat")),
        (None, Look("nothing", None)),
        (("words", torch.tensor([2.5])), Look("text", "words", 2.5)),
        (("words", np.array([0, 0, 1])), Look("text", "words", 2)),
        (("words", [0.2, 0.8]), Look("text", "words")),
        (("words", torch.tensor([0, 1, 0]), 7), Look("text", "words")),
        (("a premise", "a hypothesis", 2), Look("text", "a premise\n\na hypothesis", 2)),
        ({"premise": "a", "hypothesis": "b", "label": 2}, Look("row", [("premise", "a"), ("hypothesis", "b")], 2)),
        ({"question": "a", "label": 2}, Look("text", "a", 2)),
    ],
)
def test_an_example_is_recognised(example, look):
    assert look_at(example) == look


def test_a_vector_is_a_row_with_names_and_a_curve_without():
    long = torch.rand(50)
    assert look_at((long, 1)).kind == "curve"
    row = look_at((long, 1), columns=[f"c{i}" for i in range(50)])
    assert row.kind == "row"
    assert row.value[7] == ("c7", f"{long[7]:.4g}")


def test_images_are_what_they_were_before_they_were_normalised():
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    original = torch.rand(3, 4, 5, dtype=torch.float64)
    normalised = (original - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = look_at((normalised, 1), normalization=(mean, std)).value
    torch.testing.assert_close(shown, original.movedim(0, 2), atol=1e-7, rtol=0)  # the means are float32
    with pytest.warns(
        UserWarning, match=r"Each image is stretched to its own range, .* wrong\. Pass `norm.*\(mean, std\)\}\)`\.$"
    ):
        stretched = look_at(normalised).value
    assert (float(stretched.min()), float(stretched.max())) == (0.0, 1.0)


def test_bytes_keep_their_brightness_and_nan_is_black():
    torch.testing.assert_close(
        look_at(torch.full((2, 2), 51, dtype=torch.uint8)).value, torch.full((2, 2), 0.2).double()
    )
    assert look_at(torch.tensor([[0.5, float("nan")]])).value.tolist() == [[0.5, 0.0]]


def test_pil_images_are_images():
    image = pytest.importorskip("PIL.Image").new("RGB", (5, 3), (255, 0, 0))
    assert look_at((image, 1)).value.shape == (3, 5, 3)


class Normalize:
    def __init__(self, mean=(0.5,), std=(0.25,)):
        self.mean, self.std = mean, std


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms


MEAN, STD = 0.5, torch.tensor([0.25])


class ReadsGlobals:
    def __getitem__(self, index):
        return (index - MEAN) / STD


class Writes:
    def __getitem__(self, index):
        mean = torch.tensor([0.5])
        std = (0.25,)
        return (index - mean) / torch.tensor(std)


class Holds:
    def __init__(self, **attributes):
        self.__dict__ |= attributes


def closure(mean, std):
    return lambda image: (image - mean) / std


@pytest.mark.parametrize(
    "dataset",
    [
        Holds(transform=Compose(object(), Normalize())),
        Subset(Holds(tf=Compose(Compose(Normalize()))), [0]),
        Holds(datasets=[Holds(preprocess={"image": [Normalize()]})]),
        Holds(transforms=Holds(transform=Normalize())),
        Holds(_mean=[0.5], _std=np.array([0.25])),
        Holds(image_mean=0.5 * 255, image_std=0.25 * 255),
        Holds(transform=closure(0.5, 0.25)),
        Holds(transform=len, augment=Normalize()),
        ReadsGlobals(),
        Writes(),
    ],
)
def test_the_normalisation_of_a_dataset_is_found(dataset):
    assert normalization_of(dataset) == ((0.5,), (0.25,))


@pytest.mark.parametrize(
    "dataset",
    [
        [1],
        Holds(y_mean=22.4, y_std=9.1),
        Holds(target_mean=0.5, target_std=0.2),
        Holds(mean="average", std=2),
        Holds(mean=0.5, std=0.0),
        Holds(mean=np.zeros(7), std=np.ones(7)),
        None,
    ],
)
def test_what_is_no_normalisation_of_images_is_left_alone(dataset):
    assert normalization_of(dataset) is None


class Images(list):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


ORIGINAL = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ORIGINAL[:, :, 0, :2] = torch.tensor([0.0, 1.0], dtype=torch.float64)
ORIGINAL[1] *= 0.25  # a dark one must stay dark


@pytest.mark.parametrize(
    ("as_held", "kind"),
    [
        (lambda x: (x * 255).round().to(torch.uint8), list),
        (lambda x: x * 255, list),
        (lambda x: (x * 255).round().long(), list),
        (lambda x: (x * 65535).round().int(), list),
        (lambda x: (x * 4095).round().numpy().astype(np.uint16), list),
        (lambda x: x * 2 - 1, list),
        (lambda x: x, Images),  # mean and std are of a later step
        (lambda x: x * 255, Images),
        (lambda x: (x * 255).round().to(torch.uint8), Images),
        (lambda x: (x - torch.tensor(Images.mean)[:, None, None]) / torch.tensor(Images.std)[:, None, None], Images),
    ],
)
def test_a_dark_image_is_dark_however_the_dataset_scales_its_images(as_held, kind):
    dataset = kind((as_held(image), 0) for image in ORIGINAL)
    for given in ((dataset,), (None, dataset)):
        options = ViewOptions().suited_to(*given)
        for example, image in zip(dataset, ORIGINAL, strict=True):
            torch.testing.assert_close(options.look(example).value, image.movedim(0, 2), atol=3e-3, rtol=0)


def test_of_four_channels_the_first_three_are_shown_with_their_own_mean():
    image = torch.rand(4, 5, 6, dtype=torch.float64)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7, 0.8])
    held = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(
        look_at(held, normalization=(mean, std)).value, image[:3].movedim(0, 2), atol=1e-6, rtol=0
    )


def test_a_normalisation_of_other_images_is_noticed():
    with pytest.warns(UserWarning, match=r"Expected `normalization` to bring images into \[0, 1\], got values from"):
        assert look_at(torch.full((3, 2, 2), 9.0), normalization=(0.5, 0.25)).value.max() == 1


@pytest.mark.parametrize(
    ("label", "labels", "name"),
    [(1, ["a", "b"], "b"), (5, ["a"], "label 5"), (7, {7: "g"}, "g"), ("x", None, "x"), (0.25, ["a"], "label 0.25")],
)
def test_classes_have_names(label, labels, name):
    assert class_name(label, labels) == name


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"got Tensor of shape \[2, 3, 4, 5\]. Pass `render=`"):
        look_at(torch.zeros(2, 3, 4, 5))
    assert plain(torch.zeros(2)) is None


def test_a_normalisation_that_changes_nothing_is_told():
    rows, images = [(torch.zeros(3), 1)] * 2, [(torch.zeros(3, 4, 4), 1)] * 2
    given = ViewOptions(normalization=(0.5, 0.5))
    for data in (rows, ["a text"], [{"a": 1, "b": 2}]):
        with pytest.warns(UserWarning, match=r"`normalization` changes images only, .* `render=`"):
            given.suited_to(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.suited_to(images)
        ViewOptions(normalization=(0.5, 0.5), render=lambda example: example[0]).suited_to(rows)
        table = TensorDataset(torch.zeros(2, 3))
        table.mean, table.std = 0.0, 1.0  # of a table, which are not undone
        assert ViewOptions().suited_to(table).suited_to(table).normalization is None


def test_a_picture_of_somebody_else_does_not_fill_the_memory():
    large = struct.pack(">8sI4sIIBB", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", 9000, 9000, 8, 2)
    with pytest.raises(ValueError, match="Expected an image of at most 96 pixels a side, got 9000 x 9000"):
        image_of_png(large)
