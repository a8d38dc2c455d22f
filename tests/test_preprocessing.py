"""Images become inputs as torchvision's and timm's transforms would make them, and nonsense is refused."""

import importlib
from typing import Any

import numpy as np
import pytest

from robustdice.errors import DataError
from robustdice.images import read_image
from robustdice.model.builders import as_timm_prepares, import_torchvision
from robustdice.preprocessing import check_preprocessing
from test_images import encode, picture

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(40, 30), (31, 47), (64, 64), (23, 97), (100, 35), (24, 24)])
def test_preprocessing_is_what_torchvision_does(width: int, height: int, interpolation: str) -> None:
    import_torchvision()
    from torchvision.transforms import v2  # noqa: PLC0415

    image = picture(width, height)
    oracle = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToPILImage(),
            v2.Resize(24, interpolation=v2.InterpolationMode(interpolation)),
            v2.CenterCrop((20, 18)),
            v2.PILToTensor(),
        ]
    )
    expected = (oracle(image).double().numpy() / 255 - np.reshape(IMAGENET["mean"], (3, 1, 1))) / np.reshape(
        IMAGENET["std"], (3, 1, 1)
    )
    found = read_image(
        encode(image), {"input_size": [3, 20, 18], "resize": 24, "interpolation": interpolation, **IMAGENET}
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 24, 24), (3, 12, 48)])
@pytest.mark.parametrize("share", [0.875, 1.0])
def test_preprocessing_is_what_timm_does(mode: str, input_size: tuple[int, ...], share: float) -> None:
    import_torchvision()
    timm_data: Any = importlib.import_module("timm.data")
    found = {"interpolation": "bicubic", "crop_pct": share, "crop_mode": mode, **IMAGENET}
    oracle = timm_data.create_transform(input_size, is_training=False, **found)
    preprocessing = check_preprocessing(as_timm_prepares(found, input_size))
    for width, height in ((40, 30), (31, 47), (64, 64), (20, 97), (100, 8)):
        image = picture(width, height)
        np.testing.assert_allclose(read_image(encode(image), preprocessing), oracle(image).numpy(), atol=1e-5)


def test_an_image_can_be_squashed_to_an_input_that_is_not_square() -> None:
    image = picture(40, 30)
    found = read_image(encode(image), {"input_size": [3, 48, 192], "resize": [48, 192]})
    expected = np.asarray(image.resize((192, 48), 2), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_array_equal(found, expected)


def test_what_contain_leaves_free_has_the_colour_of_the_border() -> None:
    white = encode(picture(8, 4).point(lambda _: 255))
    preprocessing = {"input_size": [3, 8, 8], "resize": [8, 8], "fit": "contain"}
    assert read_image(white, preprocessing).mean((0, 2)).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    red = read_image(white, {**preprocessing, **check_preprocessing({**preprocessing, "border": "red"})})
    assert red[:, 0, 0].tolist() == [1, 0, 0]


def test_an_image_of_extreme_shape_does_not_fill_the_memory() -> None:
    with pytest.raises(DataError, match=r"strip is 60000x1, too long and narrow"):
        read_image(encode(picture(60000, 1)), {"input_size": [3, 224, 224], "resize": 256}, "strip")


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"size": 3}, "unknown preprocessing key 'size'"),
        ({"interpolation": "sharp"}, "unknown interpolation 'sharp'"),
        ({"interpolation": ["bilinear"]}, "unknown interpolation"),
        ({"input_size": [3, 224]}, r"input_size is \[channels, height, width\], not \[3, 224\]"),
        ({"input_size": [3, 0, 5]}, "input_size"),
        ({"input_size": 224}, "damaged"),
        ({"input_size": [3, float("inf"), 5]}, "damaged"),
        ({"mean": ["a"]}, "damaged"),
        ({"mean": [float("nan")]}, "mean must be finite"),
        ({"std": [0.0]}, "std must be positive"),
        ({"std": [float("nan")]}, "std must be positive"),
        ({"input_size": [3, 4, 4], "mean": [0.5]}, "mean has 1 entries for 3 channels"),
        ({"resize": 0}, "resize is the length of an image's short side in pixels, not 0"),
        ({"resize": "big"}, "damaged"),
        ({"resize": 256.5}, "256.5 is no whole number of pixels"),
        ({"resize": True}, "True is no whole number"),
        ({"resize": [256]}, r"the short side, or \[height, width\], in pixels, not \[256\]"),
        ({"resize": [0, 5]}, "short side, or"),
        ({"resize": [64, 48], "input_size": [3, 64, 64]}, r"resize \[64, 48\] is smaller than the \[64, 64\]"),
        ({"resize": 256, "fit": "squash"}, r"fit 'squash' goes with a resize of \[height, width\]"),
        ({"fit": "cover"}, "fit 'cover' goes with a resize"),
        ({"fit": "stretch"}, "unknown fit 'stretch'; known: squash, cover, contain"),
        ({"border": "black"}, "a border is what 'fit': 'contain' leaves"),
        ({"background": "blueish"}, "damaged"),
        ({"background": "#ffffff80"}, "no colour such as"),
        ({"background": [0, 0, 256]}, "no colour such as"),
        ({"background": 7}, "damaged"),
        ({"channels": "GBR"}, "unknown channels 'GBR'; known: RGB, BGR"),
        ({"channels": "BGR", "input_size": [1, 4, 4]}, "BGR where there are three of them, the model takes 1"),
        ({"exif_orientation": "no"}, "exif_orientation is true or false, not 'no'"),
        ({"classes": "cat"}, "classes is a list of names, not 'cat'"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(preprocessing: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_preprocessing(preprocessing)


def test_preprocessing_becomes_plain_values() -> None:
    found = check_preprocessing(
        {"input_size": (np.int64(3), 4, 5), "resize": None, "mean": (0, 0, 1), "classes": (1, 2)}
    )
    assert found == {"input_size": [3, 4, 5], "mean": [0.0, 0.0, 1.0], "classes": ["1", "2"]}
    found = check_preprocessing({"resize": (np.int64(8), 9.0), "background": "Gray", "classes": ["cafe\u0301"]})
    assert found == {"resize": [8, 9], "background": [128, 128, 128], "classes": ["caf\u00e9"]}
    assert check_preprocessing(found) == found
