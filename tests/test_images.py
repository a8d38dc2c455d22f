"""Images of every kind become inputs with their colours right, and what does not fit is refused."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustdice.errors import DataError
from robustdice.images import as_shown, check_image, check_preprocessing, normalise_pixels, read_image


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode) if mode in ("RGB", "RGBA", "CMYK") else 1
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode=None).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def test_without_resize_pixels_stay_what_they_are() -> None:
    image = picture(5, 4)
    found = read_image(encode(image), {"input_size": [3, 4, 5]})
    np.testing.assert_array_equal(found, np.asarray(image, np.float32).transpose(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
def test_any_colour_mode_becomes_grey_for_a_model_of_one_channel(mode: str) -> None:
    image = picture(6, 4).convert(mode)
    found = read_image(encode(image), {"input_size": [1, 4, 6], "mean": [0.5], "std": [0.25]})
    np.testing.assert_allclose(found, (np.asarray(image.convert("L"), np.float64)[None] / 255 - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P", "CMYK", "YCbCr"])
def test_any_colour_mode_becomes_three_channels(mode: str) -> None:
    image = picture(6, 4).convert(mode)
    found = read_image(encode(image, "TIFF"), {"input_size": [3, 4, 6]})
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255)


RAMP = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
GREY = {"input_size": [1, 32, 32]}


def pgm(levels: np.ndarray, largest: int, ascii_digits: bool = False) -> bytes:
    head = f"{'P2' if ascii_digits else 'P5'} {levels.shape[1]} {levels.shape[0]} {largest}\n".encode()
    return head + (" ".join(map(str, levels.ravel())).encode() if ascii_digits else levels.astype(">u2").tobytes())


def tiff(levels: np.ndarray, bits: int, photometric: int, mark: str = "<", sample_format: int = 1) -> bytes:
    """A grey TIFF file as other programs write them; of 12 bits, two numbers in three bytes."""
    data = levels.astype(f"{mark}u{1 if bits == 8 else 2}").tobytes()
    if bits == 12:
        pairs = levels.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.uint8).tobytes()
    height, width = levels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(f"{mark}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack(f"{mark}2sHI", b"II" if mark == "<" else b"MM", 42, 8 + len(data))
    return head + data + struct.pack(f"{mark}H", len(tags)) + entries + b"\0" * 4


DEEP = {
    "png": encode(Image.fromarray(RAMP)),
    "tiff": encode(Image.fromarray(RAMP), "TIFF"),
    "compressed tiff": encode(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "tiff of the other byte order": tiff(RAMP, 16, 1, ">"),
    "tiff where white is 0": tiff(65535 - RAMP, 16, 0),
    "tiff of 12 bits": tiff(RAMP >> 4, 12, 1),
    "jpeg 2000": encode(Image.fromarray(RAMP), "JPEG2000"),
    "pgm": pgm(RAMP, 65535),
    "pgm of 10 bits": pgm(RAMP >> 6, 1023),
    "pgm in digits": pgm(RAMP, 65535, ascii_digits=True),
    "pgm of 12 bits in digits": pgm(RAMP >> 4, 4095, ascii_digits=True),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_scaled_by_what_their_files_can_hold(kind: str) -> None:
    content = DEEP[kind]
    for preprocessing in (GREY, {"input_size": [3, 32, 32]}):
        found = read_image(content, preprocessing)
        assert np.abs(found - RAMP / 65535).max() < 0.51 / 255 + 1 / 1023
    check_image(content, GREY)


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_images_whose_white_nobody_knows_are_refused(kind: str) -> None:
    floats = encode(Image.fromarray((RAMP / 65535).astype(np.float32)), kind)
    for refuses in (read_image, check_image):
        with pytest.raises(DataError, match=r"the image scan has floating-point pixels, .* save it with 8 or 16 bits"):
            refuses(floats, GREY, "scan")
        with pytest.raises(DataError, match="scan has pixels of 32 bits, or below zero"):
            refuses(encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), GREY, "scan")
        for bits in (8, 16):
            signed = tiff(RAMP >> (17 - bits), bits, 1, sample_format=2)
            with pytest.raises(DataError, match="scan has pixels of 32 bits, or below zero"):
                refuses(signed, GREY, "scan")


def test_every_mode_of_pillow_is_shown_or_refused() -> None:
    modes = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
    deep = ["I;16", "I;16L", "I;16B", "I;16N"]
    for mode in [*modes, *deep, "I", "F"]:
        for channels, shown in ((1, "L"), (3, "RGB")):
            image = Image.new(mode, (3, 2))
            if mode in ("I", "F"):
                with pytest.raises(DataError, match="nothing in it says which number is white"):
                    as_shown(image, channels, "scan")
            else:
                assert (as_shown(image, channels, "scan").mode, image.size) == (shown, (3, 2))


def test_what_is_transparent_shows_the_background() -> None:
    glyph = Image.new("RGBA", (8, 8), (0, 0, 0, 0))  # black on nothing
    glyph.paste((0, 0, 0, 255), (2, 2, 6, 6))
    half = Image.new("LA", (8, 8), (0, 127))
    size = {"input_size": [3, 8, 8]}
    for image, kind in ((glyph, "PNG"), (glyph.convert("LA"), "PNG"), (glyph, "WEBP"), (glyph, "GIF"), (glyph, "TIFF")):
        found = read_image(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})), size)
        assert found[:, 0, 0].tolist() == [1, 1, 1]  # white
        assert found[:, 4, 4].tolist() == [0, 0, 0]
    blue = read_image(encode(glyph), {**size, **check_preprocessing({"background": "blue"})})
    assert blue[:, 0, 0].tolist() == [0, 0, 1]
    np.testing.assert_allclose(read_image(encode(half), {"input_size": [1, 8, 8], "background": [0, 0, 0]}), 0)
    np.testing.assert_allclose(read_image(encode(half), {"input_size": [1, 8, 8]}), 0.5, atol=0.01)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16", "1"])
def test_a_colour_that_a_png_declares_transparent_shows_the_background(mode: str) -> None:
    image = Image.fromarray(np.zeros((4, 4), np.uint16)) if mode == "I;16" else Image.new(mode, (4, 4))
    found = read_image(encode(image, transparency=(0, 0, 0) if mode == "RGB" else 0), {"input_size": [3, 4, 4]})
    assert found.min() == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photograph_is_turned_as_its_camera_was_held(orientation: int, kind: str) -> None:
    upright = Image.new("L", (16, 32))
    upright.paste(255, (0, 0, 8, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes what the tag asks for
    lying = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    content = encode(lying.convert("RGB"), kind, exif=exif)
    found = read_image(content, {"input_size": [1, 32, 16]})
    np.testing.assert_allclose(found[0], np.asarray(upright) / 255, atol=0.05)
    check_image(content, {"input_size": [1, 32, 16]})
    if kind != "TIFF":  # which Pillow itself turns
        preprocessing = {"input_size": [1, lying.height, lying.width], "exif_orientation": False}
        np.testing.assert_allclose(read_image(content, preprocessing)[0], np.asarray(lying) / 255, atol=0.05)


def test_damaged_metadata_turn_nothing() -> None:
    content = encode(picture(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(content, {"input_size": [3, 8, 8]}).shape == (3, 8, 8)


def test_of_several_frames_the_first_is_read() -> None:
    frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert read_image(content, {"input_size": [1, 4, 4]}).max() < 0.05


def test_channels_come_in_the_order_that_the_model_takes() -> None:
    content = encode(Image.new("RGB", (2, 2), (255, 0, 51)))
    size = {"input_size": [3, 2, 2], "mean": [0.2, 0, 0]}
    assert read_image(content, {**size, "channels": "BGR"})[:, 0, 0].tolist() == pytest.approx([0, 0, 1])
    assert read_image(content, {**size, "channels": "RGB"})[:, 0, 0].tolist() == pytest.approx([0.8, 0, 0.2])


WHOLE = {
    "png": encode(picture(12, 12)),
    "jpeg": encode(picture(12, 12), "JPEG"),
    "progressive": encode(picture(12, 12), "JPEG", progressive=True),
    "jpeg with a tail": encode(picture(12, 12), "JPEG") + b"\0" * 300,
    **{kind: encode(picture(12, 12), kind) for kind in ("GIF", "BMP", "WEBP", "TIFF", "PPM", "QOI")},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_check_finds_the_truncated_images_that_reading_refuses(kind: str, tmp_path: Path) -> None:
    content, size = WHOLE[kind], {"input_size": [3, 12, 12]}
    check_image(content, size)
    for length in [*range(0, len(content), 7), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        for source in (content[:length], tmp_path / "cut"):
            assert is_refused(check_image, source, size) == is_refused(read_image, source, size), length


def is_refused(way: Any, source: bytes | Path, size: dict[str, Any]) -> bool:
    try:
        way(source, size, "cut")
    except DataError:
        return True
    return False


def test_a_check_needs_no_decoding_of_common_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for kind in ("png", "jpeg", "progressive"):
        check_image(WHOLE[kind], {"input_size": [3, 12, 12]})


def test_a_check_finds_images_of_a_wrong_size() -> None:
    with pytest.raises(DataError, match="is 12x12, the model takes 12x9"):
        check_image(WHOLE["jpeg"], {"input_size": [3, 9, 12]})


def test_only_formats_that_are_safe_to_open_are_opened(tmp_path: Path) -> None:
    script = tmp_path / "a.jpg"  # which would start Ghostscript
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(DataError, match=r"cannot read the image .* a format or kind of pixels that is not read"):
        read_image(script, {"input_size": [3, 9, 9]})


def test_what_only_looks_like_an_image_is_named() -> None:
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"", "it is empty"),
    ):
        with pytest.raises(DataError, match=said):
            read_image(content, {"input_size": [3, 9, 9]}, "a")


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
