"""Folders and zip files as people have them: the images are found, everything else is counted and named."""

import os
import socket
import stat
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustdice.errors import DataError
from robustdice.model.folders import Found, find_images
from test_images import encode, picture

IMAGE = encode(picture(4, 4))
CAFE = "caf\u00e9"
DECOMPOSED = unicodedata.normalize("NFD", CAFE)


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)


def names(found: Found) -> list[str]:
    return [file.name for file in found.files]


def left_out(found: Found) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {left.kind: (left.count, left.first) for left in found.left_out}


def test_files_with_the_suffixes_of_images_are_found_however_these_are_written(tmp_path: Path) -> None:
    put(tmp_path, "a/1.JPG", "a/2.jfif", "a/3.Gif", "b/4.tiff", "b/c/5.webp", "6.png")
    assert names(find_images(tmp_path)) == ["6.png", "a/1.JPG", "a/2.jfif", "a/3.Gif", "b/4.tiff", "b/c/5.webp"]
    assert find_images(tmp_path).left_out == ()


def test_everything_else_is_counted_and_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/.hidden.png", "__MACOSX/a/1.png", "@eaDir/1.png/S.jpg", "a/Thumbs.db", "raw", "x.HEIC")
    put(tmp_path, *(f"notes{number}.txt" for number in range(5)))
    (tmp_path / "a" / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "a" / "s.jpg"))
        found = find_images(tmp_path)
    assert names(found) == ["a/1.png"]
    assert left_out(found) == {
        "empty": (1, ("a/folder.jpg",)),
        "hidden or left behind by archivers": (4, ("@eaDir", "__MACOSX", "a/.hidden.png")),
        "of a special kind (device, pipe, socket)": (2, ("a/pipe.jpg", "a/s.jpg")),
        "of the kind .heic": (1, ("x.HEIC",)),
        "of the kind .txt": (5, ("notes0.txt", "notes1.txt", "notes2.txt")),
        "without a suffix": (1, ("raw",)),
    }
    assert str(found.left_out[4]) == "5 of the kind .txt (notes0.txt, notes1.txt, notes2.txt, ...)"


def test_images_in_a_folder_that_is_called_like_one_are_found(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg/1.png")
    assert names(find_images(tmp_path)) == ["a.jpg/1.png"]


def test_links_are_followed_and_dangling_ones_named(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "cats/1.png", "photo.png")
    data = tmp_path / "data"
    put(data, "dog/1.png")
    (data / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (data / "dog" / "2.png").symlink_to(tmp_path / "elsewhere" / "photo.png")
    (data / "dog" / "3.png").symlink_to("nowhere.png")
    (data / "dog" / "4.png").symlink_to("4.png")
    found = find_images(data)
    assert names(found) == ["cat/1.png", "dog/1.png", "dog/2.png"]
    assert left_out(found) == {"linked to nowhere": (2, ("dog/3.png", "dog/4.png"))}
    (tmp_path / "link").symlink_to(data)
    assert names(find_images(tmp_path / "link")) == names(found)


@given(
    links=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "a", "b", "c", "..", "../.."])), max_size=5)
)
def test_links_in_circles_end_and_every_image_is_found_once(
    links: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("above") / "data"
    put(root, "a/1.png", "b/2.png", "c/3.png")
    for number, (folder, target) in enumerate(links):
        (root / folder / f"0{number}").symlink_to(os.path.relpath(root / target, root / folder))
    found = find_images(root)
    assert names(found) == ["a/1.png", "b/2.png", "c/3.png"]
    assert sum(left.count for left in found.left_out) == len(links)


def pack(path: Path, entries: dict[str, int], flags: int = 0) -> Path:
    """A zip file with images of these names and external attributes; names are stored as they are."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, attributes in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = attributes
            archive.writestr(entry, b"" if name.endswith(("/", "\\")) else IMAGE)
    content = path.read_bytes()
    if flags:
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            parts = content.split(mark)
            changed = [p[: place - 4] + bytes([p[place - 4] | flags]) + p[place - 3 :] for p in parts[1:]]
            content = mark.join([parts[0], *changed])
        path.write_bytes(content)
    return path


def test_a_zip_file_of_windows_is_read(tmp_path: Path) -> None:
    entries = {"data\\": 0x10, "data\\cat\\": 0x10, "data\\cat\\1.png": 0, "data\\dog\\2.png": 0, "data\\x.png": 0x10}
    found = find_images(pack(tmp_path / "a.zip", entries))
    assert names(found) == ["data/cat/1.png", "data/dog/2.png"]
    assert [file.content() for file in found.files] == [IMAGE, IMAGE]


def test_names_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    put(tmp_path / "data", f"{DECOMPOSED}/1.png")
    assert names(find_images(tmp_path / "data")) == [f"{CAFE}/1.png"]
    assert names(find_images(pack(tmp_path / "a.zip", {f"{DECOMPOSED}/1.png": 0}))) == [f"{CAFE}/1.png"]


def test_names_in_utf_8_are_read_where_the_zip_file_does_not_say_so(tmp_path: Path) -> None:
    name = f"{DECOMPOSED}/1.png".encode()
    mac = pack(tmp_path / "a.zip", {"x" * len(name): 0})  # of ASCII, so without the flag that says UTF-8
    mac.write_bytes(mac.read_bytes().replace(b"x" * len(name), name))
    found = find_images(mac)
    assert names(found) == [f"{CAFE}/1.png"]
    assert found.files[0].content() == IMAGE


def test_links_and_devices_in_a_zip_file_are_not_followed(tmp_path: Path) -> None:
    entries = {"a/1.png": 0, "a/2.png": (stat.S_IFLNK | 0o777) << 16, "a/3.png": (stat.S_IFCHR | 0o644) << 16}
    found = find_images(pack(tmp_path / "a.zip", entries))
    assert names(found) == ["a/1.png"]
    assert left_out(found) == {
        "linked in a zip file": (1, ("a/2.png",)),
        "of a special kind (device, pipe, socket)": (1, ("a/3.png",)),
    }


def test_encrypted_images_are_found_and_refused_with_the_way_out(tmp_path: Path) -> None:
    found = find_images(pack(tmp_path / "a.zip", {"a/1.png": 0}, flags=1))
    with pytest.raises(DataError, match=r"cannot read .*a\.zip/a/1\.png: it is encrypted; unpack .* with its password"):
        found.files[0].content()


def test_a_folder_of_a_zip_file_can_be_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"top/val/cat/1.png": 0, "top/train/cat/2.png": 0})
    assert names(find_images(path / "top" / "val")) == ["cat/1.png"]
    with pytest.raises(DataError, match=r"a\.zip has no folder top/test"):
        find_images(path / "top" / "test")


def test_an_empty_folder_of_a_zip_file_is_named_and_one_that_holds_something_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("top/", "top/cat/", "top/cat/1.png", "top/dog/", "top/deep/er/1.png"):
            archive.writestr(name, b"" if name.endswith("/") else IMAGE)
    assert left_out(find_images(path)) == {"empty": (1, ("top/dog",))}


TEXT = st.text(st.characters(exclude_characters='/\\:<>|"?*', categories=("L", "M", "N", "P", "S", "Z")), max_size=8)
PART = TEXT.map(str.strip).filter(lambda part: part and not part.startswith(".") and len(part.encode()) < 80)


@given(
    parts=st.lists(PART, min_size=1, max_size=3),
    backslashes=st.booleans(),
)
def test_whatever_its_name_an_image_is_found_in_a_folder_and_in_a_zip_file(
    parts: list[str], backslashes: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    put(root / "data", "/".join([*parts, "1.png"]))
    separator = "\\" if backslashes else "/"
    zipped = pack(root / "a.zip", {separator.join([*parts, "1.png"]): 0})
    expected = unicodedata.normalize("NFC", "/".join([*parts, "1.png"]))
    assert names(find_images(root / "data")) == names(find_images(zipped)) == [expected]


def test_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/gr\xfcn"
    Path(os.fsdecode(folder)).mkdir()
    Path(os.fsdecode(folder + b"/1.png")).write_bytes(IMAGE)
    found = find_images(tmp_path)
    assert names(found) == ["gr\ufffdn/1.png"]
    assert Path(os.fsdecode(found.files[0].content())).read_bytes() == IMAGE


def test_a_single_image_is_found(tmp_path: Path) -> None:
    put(tmp_path, "photo.jpeg")
    assert names(find_images(tmp_path / "photo.jpeg")) == ["photo.jpeg"]


def test_where_there_are_no_images_what_there_is_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.heic", "a/2.heic", "list.txt")
    with pytest.raises(
        DataError, match=r"holds no images .*; it has 2 of the kind \.heic \(a/1\.heic, a/2\.heic\), 1 of"
    ):
        find_images(tmp_path)
    with pytest.raises(DataError, match=r"list\.txt is no zip file, or a damaged one, .*: unpack archives"):
        find_images(tmp_path / "list.txt")


def test_another_image_has_another_mark(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    before = find_images(tmp_path).files
    (tmp_path / "a.png").write_bytes(encode(picture(5, 5)))
    after = find_images(tmp_path).files
    assert (before[0].mark != after[0].mark, before[1].mark == after[1].mark) == (True, True)
