"""Images become inputs as torchvision's transforms would make them, and what does not fit is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustdice.errors import DataError
from robustdice.images import check_preprocessing, class_of, normalise_pixels, read_image
from robustdice.model.load import import_torchvision

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode) if mode in ("RGB", "RGBA", "CMYK") else 1
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode=None).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


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


def test_without_resize_pixels_stay_what_they_are() -> None:
    image = picture(5, 4)
    found = read_image(encode(image), {"input_size": [3, 4, 5]})
    np.testing.assert_array_equal(found, np.asarray(image, np.float32).transpose(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
def test_any_colour_mode_becomes_grey_for_a_model_of_one_channel(mode: str) -> None:
    image = picture(6, 4).convert(mode)
    found = read_image(encode(image), {"input_size": [1, 4, 6], "mean": [0.5], "std": [0.25]})
    np.testing.assert_allclose(found, (np.asarray(image.convert("L"), np.float64)[None] / 255 - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P"])
def test_any_colour_mode_becomes_three_channels(mode: str) -> None:
    image = picture(6, 4).convert(mode)
    found = read_image(encode(image), {"input_size": [3, 4, 6]})
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255)


def test_pixels_are_normalised_channel_by_channel() -> None:
    pixels = np.full((2, 3, 1, 1), 0.5, np.float32)
    found = normalise_pixels(pixels, {"input_size": [3, 1, 1], "mean": [0.5, 0.25, 0.0], "std": [1.0, 0.5, 0.25]})
    assert found.reshape(2, 3).tolist() == [[0.0, 0.5, 2.0]] * 2


def test_a_wrong_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(picture(7, 5)))
    with pytest.raises(DataError, match=r"a\.png is 7x5, the model takes 6x5; resize the images, or .* resize"):
        read_image(tmp_path / "a.png", {"input_size": [3, 5, 6]})


def test_too_small_for_the_crop_is_refused() -> None:
    with pytest.raises(DataError, match="short side of 8 after resizing, too small for 9x9; raise resize"):
        read_image(encode(picture(20, 10)), {"input_size": [3, 9, 9], "resize": 8}, "image")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "empty.png"):
        with pytest.raises(DataError, match=f"cannot read the image .*{name}"):
            read_image(tmp_path / name, {"input_size": [3, 4, 4]})
    with pytest.raises(DataError, match=r"there is no image .*missing\.png"):
        read_image(tmp_path / "missing.png", {"input_size": [3, 4, 4]})
    with pytest.raises(DataError, match="cannot read the image"):
        read_image(tmp_path, {"input_size": [3, 4, 4]})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_damaged_images_are_refused_or_read_but_nothing_else(kind: str) -> None:
    content = encode(picture(16, 16), kind)
    random = np.random.default_rng(0)
    refused = []
    for attempt in range(150):
        damaged = bytearray(content)
        if attempt % 2:
            damaged = damaged[: int(random.integers(0, len(content)))]
        else:
            for place in random.integers(0, min(len(content), 60), 3):
                damaged[place] = int(random.integers(0, 256))
        try:
            read_image(bytes(damaged), {"input_size": [3, 16, 16]}, "damaged")
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("damaged" in message for message in refused)


def test_a_truncated_photograph_is_refused() -> None:
    content = encode(picture(64, 64), "JPEG", quality=90)
    with pytest.raises(DataError, match=r"cannot read the image photo: .*truncated"):
        read_image(content[: len(content) // 2], {"input_size": [3, 64, 64]}, "photo")


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match="the image bomb is too large to be decoded safely"):
        read_image(encode(picture(16, 8)), {"input_size": [3, 8, 16]}, "bomb")
    assert read_image(encode(picture(9, 8)), {"input_size": [3, 8, 9]}).shape == (3, 8, 9)


def test_models_of_other_channels_take_no_images() -> None:
    with pytest.raises(DataError, match="images have 1 or 3 channels, the model takes 4"):
        read_image(encode(picture(4, 4)), {"input_size": [4, 4, 4]})


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
        ({"classes": "cat"}, "classes is a list of names, not 'cat'"),
        ({"classes": ["cat", "dog", "cat"]}, "the class 'cat' is named twice"),
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


def test_class_of_names_what_it_knows() -> None:
    assert class_of("dog", ["cat", "dog"], "data") == 1
    with pytest.raises(DataError, match=r"folder 'bird' of data is no class .*'cat', 'dog'.* --classes FILE"):
        class_of("bird", ["cat", "dog"], "data")
