"""Folders and zip files of images, and the digits."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from robustdice.errors import DataError
from robustdice.model.data import Dataset, load_data
from robustdice.model.digits import PREPROCESSING
from test_images import encode, picture

SIZE = {"input_size": [3, 4, 4]}
FILES = {"top/cat/2.png": 0, "top/cat/10.jpg": 0, "top/dog/1.png": 1, "top/dog/sub/ant/3.bmp": 2}
KINDS = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP"}


def contents() -> dict[str, bytes]:
    return {name: encode(picture(4, 4, seed=seed), KINDS[Path(name).suffix]) for seed, name in enumerate(FILES)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, content in contents().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "top" / "README.txt").write_text("about these images")
    return root


def pack(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return target


def test_the_parent_folder_is_the_class_whatever_lies_above(folder: Path) -> None:
    data = load_data(str(folder), {**SIZE, "classes": ["dog", "ant", "bee", "cat"]}, 4)
    assert data.labels.tolist() == [3, 3, 0, 1]  # cat/10.jpg, cat/2.png, dog/1.png, ant/3.bmp
    assert data.name == "data"
    assert data.images().shape == (4, 3, 4, 4)
    pixels = np.asarray(picture(4, 4, seed=2), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_array_equal(data.read(2), pixels)


def test_as_many_folders_as_outputs_are_the_classes_in_alphabetical_order(folder: Path) -> None:
    assert load_data(str(folder), SIZE, 3).labels.tolist() == [1, 1, 2, 0]


def test_fewer_folders_than_outputs_need_names(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has 3 class folders, the model 4 outputs, .* --classes FILE"):
        load_data(str(folder), SIZE, 4)


def test_a_folder_that_is_no_class_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the folder 'ant' of .* is no class of the model"):
        load_data(str(folder), {**SIZE, "classes": ["cat", "dog"]}, 2)


def test_a_zip_file_gives_the_same_as_the_folder(folder: Path, tmp_path: Path) -> None:
    ours = load_data(str(folder), SIZE, 3)
    zipped = load_data(str(pack(folder, tmp_path / "data.zip")), SIZE, 3)
    np.testing.assert_array_equal(zipped.labels, ours.labels)
    np.testing.assert_array_equal(zipped.images(), ours.images())


def test_what_archivers_leave_behind_is_no_image(folder: Path, tmp_path: Path) -> None:
    (folder / "top" / "cat" / "._2.png").write_bytes(b"\0\5\x16\7")
    (folder / "__MACOSX" / "cat").mkdir(parents=True)
    (folder / "__MACOSX" / "cat" / "2.png").write_bytes(b"\0\5\x16\7")
    assert len(load_data(str(folder), SIZE, 3)) == 4
    assert len(load_data(str(pack(folder, tmp_path / "data.zip")), SIZE, 3)) == 4


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image folder or zip file .*nowhere; DATA is such a path, or 'digits'"):
        load_data(str(tmp_path / "nowhere"), SIZE, 2)
    with pytest.raises(DataError, match="holds no images"):
        load_data(str(tmp_path), SIZE, 2)
    (tmp_path / "loose.png").write_bytes(encode(picture(4, 4)))
    with pytest.raises(DataError, match=r"the image loose\.png is in no class folder"):
        load_data(str(tmp_path), SIZE, 2)
    with pytest.raises(DataError, match=r"cannot read .*loose\.png as a zip file"):
        load_data(str(tmp_path / "loose.png"), SIZE, 2)
    with pytest.raises(DataError, match="--size, --mean and --std"):
        load_data("digits", {}, 10)


def test_a_damaged_zip_file_is_refused(folder: Path, tmp_path: Path) -> None:
    path = pack(folder, tmp_path / "data.zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("top/cat/2.png")
    start = entry.header_offset + 30 + len(entry.filename)
    for place in range(start, start + entry.compress_size):
        damaged = content.copy()
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        data = load_data(str(path), SIZE, 3)
        with pytest.raises(DataError, match=r"cannot read .*top/cat/2\.png"):
            data.read(1)


def test_images_are_in_order(folder: Path) -> None:
    data = load_data(str(folder), SIZE, 3)
    np.testing.assert_array_equal(np.concatenate([data.images(0, 3), data.images(3)]), data.images())


def test_other_images_have_another_digest(folder: Path, tmp_path: Path) -> None:
    whole = load_data(str(folder), SIZE, 3)
    assert load_data(str(folder), SIZE, 3).digest == whole.digest
    assert len({whole.digest, whole.sample(2).digest, whole.sample(3).digest}) == 3
    zipped = load_data(str(pack(folder, tmp_path / "same.zip")), SIZE, 3).digest
    assert load_data(str(folder), {**SIZE, "mean": [0.1] * 3}, 3).digest != whole.digest
    image = folder / "top/dog/sub/ant/3.bmp"  # of the same size, whatever is on it
    image.write_bytes(encode(picture(4, 4, seed=99), "BMP"))
    assert load_data(str(folder), SIZE, 3).digest != whole.digest
    assert load_data(str(pack(folder, tmp_path / "same.zip")), SIZE, 3).digest != zipped


def numbered(labels: list[int]) -> Dataset:
    return Dataset("numbers", np.array(labels), lambda index: np.full((1, 1, 1), index, np.float32))


def test_a_sample_is_balanced_seeded_and_in_order() -> None:
    data = numbered([0] * 50 + [1] * 30 + [2] * 3)
    sample = data.sample(18, seed=1)
    assert np.bincount(sample.labels).tolist() in ([8, 7, 3], [7, 8, 3])
    chosen = sample.images().ravel().astype(int)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    np.testing.assert_array_equal(data.labels[chosen], sample.labels)
    np.testing.assert_array_equal(data.sample(18, seed=1).images(), sample.images())
    assert not np.array_equal(data.sample(18, seed=2).images(), sample.images())
    assert len(data.sample(20, seed=1).sample(5)) == 5


def test_a_sample_of_everything_is_everything() -> None:
    data = numbered([0, 1, 0])
    assert data.sample(None) is data
    assert data.sample(3) is data
    assert len(data.sample(99)) == 3
    with pytest.raises(DataError, match="--samples must be at least 1, not 0"):
        data.sample(0)


def test_digits_come_normalised() -> None:
    data = load_data("digits", PREPROCESSING, 10)
    assert len(data) == 797
    train = load_data("digits", PREPROCESSING, 10, split="train")
    images = train.images()
    assert images.shape == (1000, 1, 32, 32)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01
    with pytest.raises(DataError, match=r"digits are \[1, 32, 32\], the model takes \[3, 32, 32\]"):
        load_data("digits", {"input_size": [3, 32, 32]}, 10)
