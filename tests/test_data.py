"""Folders and zip files of images, and the digits."""

import zipfile
import zlib
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
    with pytest.raises(DataError, match=r"the image loose\.png is in no class folder"):
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


def put(root: Path, *names: str, content: bytes = b"") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content or encode(picture(4, 4)))
    return root


@pytest.mark.parametrize(
    ("names", "sides", "way_out"),
    [
        (("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"), "'train' and 'val'", "val"),
        (("train_set/cat/1.png", "val_set/cat/2.png"), "'train_set' and 'val_set'", "val_set"),
        (("Training/cat/1.png", "Testing/dog/2.png"), "'Testing' and 'Training'", "Testing"),
        (("in/train/cat/1.png", "in/train/dog/2.png", "in/val/3.png"), "'in/train' and 'in/val'", "in/train"),
        (("a/cat/1.png", "a/dog/1.png", "b/x/cat/1.png"), "'a' and 'b/x'", "a"),
        (("cat/1.png", "dog/2.png", "more/cat/1.png"), "'.' and 'more'", "more"),
        (("cat/2020/1.png", "cat/2021/1.png", "dog/2020/1.png"), "'cat' and 'dog'", "cat"),
        (("train/1.png", "val/2.png"), "'train' and 'val'", "val"),
    ],
)
def test_splits_side_by_side_are_refused_with_the_way_out(
    names: tuple[str, ...], sides: str, way_out: str, tmp_path: Path
) -> None:
    root = put(tmp_path / "data", *names)
    for data in (root, pack(root, tmp_path / "data.zip")):
        with pytest.raises(DataError) as refused:
            load_data(str(data), SIZE, 2)
        assert str(refused.value) == (
            f"{data} has images of the same classes, or of several splits, in {sides}, which are not to be "
            "measured together; an image's class is the folder right above it. "
            f"Give one of them, as in {data / way_out}"
        )


def test_the_way_out_of_splits_works_in_a_zip_file_too(tmp_path: Path) -> None:
    root = put(
        tmp_path / "data", "train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png", "val/dog/3.png"
    )
    for data in (root, pack(root, tmp_path / "data.zip")):
        assert load_data(str(data / "val"), SIZE, 2).labels.tolist() == [0, 1, 1]


def test_what_was_left_out_is_said_when_folders_are_no_classes(tmp_path: Path) -> None:
    root = put(tmp_path / "data", "cat/1.png", "dog/1.heic")
    (root / "dogs").symlink_to(root / "cat")
    with pytest.raises(DataError, match=r"; not read: 1 linked to .* \(dogs\), 1 of the kind .* \(dog/1\.heic\)$"):
        load_data(str(root), SIZE, 2)


def test_train_can_be_the_name_of_a_class(tmp_path: Path) -> None:
    root = put(tmp_path / "vehicles", "train/1.png", "tram/1.png", "validation/1.png")
    assert load_data(str(root), SIZE, 3).labels.tolist() == [0, 1, 2]
    root = put(tmp_path / "two", "train/1.png", "test/1.png")
    assert load_data(str(root), {**SIZE, "classes": ["train", "test"]}, 2).labels.tolist() == [1, 0]


def test_without_labels_any_images_will_do(tmp_path: Path) -> None:
    flat = put(tmp_path / "flat", "1.png", "2.png", "3.png")
    mixed = put(tmp_path / "mixed", "1.png", "no class/2.png", "no class/deeper/3.png")
    splits = put(tmp_path / "splits", "train/cat/1.png", "val/cat/2.png", "val/dog/3.png")
    for data in (flat, mixed, splits, *(pack(root, root.with_suffix(".zip")) for root in (flat, mixed, splits))):
        found = load_data(str(data), SIZE, 1000, labelled=False)
        assert found.labels.tolist() == [-1, -1, -1]
        assert found.images().shape == (3, 3, 4, 4)
    assert found.notes.inferred == ("the images of 'train' and 'val' are used alike",)
    single = load_data(str(flat / "1.png"), SIZE, 1000, labelled=False)
    assert (len(single), single.name) == (1, "1.png")
    assert single.images().shape == (1, 3, 4, 4)


def test_a_sample_without_labels_is_seeded_and_balanced_over_folders(tmp_path: Path) -> None:
    root = put(tmp_path / "data", *(f"many/{n}.png" for n in range(30)), *(f"few/{n}.png" for n in range(4)))
    data = load_data(str(root), SIZE, 7, labelled=False)
    assert [mark.split()[1].split("/")[0] for mark in data.sample(8, seed=1).marks].count("few") == 4
    assert data.sample(8, seed=1).marks == data.sample(8, seed=1).marks != data.sample(8, seed=2).marks


def test_bad_images_are_listed_before_any_work_and_the_list_has_an_end(folder: Path) -> None:
    photo = encode(picture(4, 4), "JPEG")
    put(folder / "top/dog", "cut.jpg", content=photo[:-9])
    put(folder / "top/dog", "large.png", content=encode(picture(5, 5)))
    data = load_data(str(folder), SIZE, 3)
    with pytest.raises(DataError) as refused:
        data.checked()
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("2 of 6 images cannot be used; repair or remove them, or go on without them with --skip")
    assert "dog/cut.jpg" in lines[1]
    assert "dog/large.png is 5x5, the model takes 4x4" in lines[2]
    put(folder / "top/dog", *(f"{number}.gif" for number in range(20)), content=b"GIF89a")
    with pytest.raises(DataError, match=r"  and 12 more$"):
        load_data(str(folder), SIZE, 3).checked()


def test_bad_images_can_be_skipped_and_are_counted(folder: Path) -> None:
    bad = {"cut.jpg": encode(picture(4, 4), "JPEG")[:-9], "cut.png": encode(picture(4, 4))[:60]}
    for name, content in bad.items():
        put(folder / "top/dog", name, content=content)
    data = load_data(str(folder), SIZE, 3).checked(skip_bad=True)
    assert data.labels.tolist() == [1, 1, 2, 0]
    assert data.images().shape == (4, 3, 4, 4)
    assert len(data.notes.skipped) == 2
    assert "went on without 2 bad images" in data.notes.sentences()[-1]
    assert len(data.marks) == 4
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(DataError, match="2 of 2 images cannot be used"):
        load_data(str(folder), {**SIZE, "classes": ["dog"]}, 1).checked(skip_bad=True)


def test_images_that_fail_only_when_they_are_decoded_are_skipped_too(folder: Path) -> None:
    damaged = bytearray(encode(picture(4, 4)))
    start = damaged.index(b"IDAT")
    length = int.from_bytes(damaged[start - 4 : start], "big")
    damaged[start + 4 : start + 4 + length] = bytes(length)
    damaged[start + 4 + length : start + 8 + length] = zlib.crc32(damaged[start : start + 4 + length]).to_bytes(
        4, "big"
    )
    put(folder / "top/dog", "bad.png", content=bytes(damaged))
    data = load_data(str(folder), SIZE, 3).checked()
    with pytest.raises(DataError, match=r"bad\.png"):
        data.images()
    assert len(load_data(str(folder), SIZE, 3).checked(skip_bad=True)) == 4


def test_what_was_inferred_and_left_out_is_data(folder: Path) -> None:
    notes = load_data(str(folder), SIZE, 3).notes
    assert notes.as_json() == {
        "inferred": ("the outputs are taken for the folders in alphabetical order (ant, cat, dog)",),
        "left_out": ({"kind": "of the kind .txt", "count": 1, "first": ("top/README.txt",)},),
        "skipped": (),
    }
    assert notes.sentences() == [*notes.inferred, "not read: 1 of the kind .txt (top/README.txt)"]


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


def test_what_is_not_in_a_sample_is_what_is_left() -> None:
    data = numbered([0] * 50 + [1] * 30 + [2] * 3)
    sample, left = data.divide(18, seed=1)
    np.testing.assert_array_equal(sample.images(), data.sample(18, seed=1).images())
    numbers = [of.images().ravel().astype(int).tolist() for of in (sample, left)]
    assert sorted(numbers[0] + numbers[1]) == list(range(83))
    assert numbers[1] == sorted(numbers[1])
    np.testing.assert_array_equal(left.labels, data.labels[numbers[1]])


def test_a_sample_of_everything_is_everything() -> None:
    data = numbered([0, 1, 0])
    assert [len(of) for of in data.divide(3)] == [3, 0]
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
