"""Which output a folder stands for: what files of classes say, what is told by numbers and WNIDs, and what is not."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustdice.errors import DataError
from robustdice.model.classes import imagenet_classes, label_folders, read_classes

WNIDS = Path(__file__).parents[2] / "shared" / "data" / "imagenet_wnids.txt"


def classes_in(content: str | bytes, tmp_path: Path) -> list[str]:
    path = tmp_path / "classes.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_classes(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_is_a_name_whatever_its_file_looks_like(encoding: str, end: str, tmp_path: Path) -> None:
    lines = ["great white shark", "", "tiger shark ", "cafe\u0301", "  ", "3 of clubs"]
    assert classes_in(end.join(lines).encode(encoding), tmp_path) == [
        "great white shark",
        "tiger shark",
        "caf\u00e9",
        "3 of clubs",
    ]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["0 cat", "1 dog"], ["cat", "dog"]),
        (["1: great white shark", "2: dog"], ["great white shark", "dog"]),
        (["1) dog", "0) cat"], ["cat", "dog"]),
        (["0,cat", "1, dog"], ["cat", "dog"]),
        (["00 - cat", "01 - dog"], ["cat", "dog"]),
        (["0 n01440764 tench", "1 n01443537 goldfish"], ["n01440764 tench", "n01443537 goldfish"]),
        (["0 cat", "dog"], ["0 cat", "dog"]),
        (["0 cat", "2 dog"], ["0 cat", "2 dog"]),
        (["0 cat", "0 dog"], ["0 cat", "0 dog"]),
        (["7 up", "8 ball"], ["7 up", "8 ball"]),
        (["0", "1", "10"], ["0", "1", "10"]),
        (["2CV", "911"], ["2CV", "911"]),
    ],
)
def test_numbers_before_all_names_are_places_when_they_count(
    lines: list[str], names: list[str], tmp_path: Path
) -> None:
    assert classes_in("\n".join(lines), tmp_path) == names


def test_files_that_name_no_classes_are_refused(tmp_path: Path) -> None:
    for content, said in (
        (b"\n \n", "names no classes"),
        (b"\xff\x00", "not UTF-8 text"),
        (b"a\0\n\0", "zero bytes"),
        (b"", "names no classes"),
    ):
        with pytest.raises(DataError, match=said):
            classes_in(content, tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*missing"):
        read_classes(tmp_path / "missing")


def labels(folders: list[str], outputs: int, classes: list[str] | None = None) -> Any:
    return label_folders({"classes": classes} if classes else {}, folders, outputs, "data")


def test_a_folder_is_called_after_its_class_its_wnid_or_the_name_behind_it() -> None:
    classes = ["n01440764 tench, Tinca tinca", "n01484850 great white shark", "dog", "caf\u00e9"]
    for index, folders in enumerate(
        (
            ("n01440764", "tench", "tench, Tinca tinca", "n01440764 tench, Tinca tinca"),
            ("n01484850", "great white shark", "n01484850 great white shark"),
            ("dog",),
            ("caf\u00e9", "cafe\u0301"),
        )
    ):
        for folder in folders:
            assert labels([folder], 4, classes).indices == {folder: index}
    for folder in ("great", "n01440765", "dogs"):
        with pytest.raises(DataError, match=rf"folder '{folder}' of data is no class .*'dog'.* --classes FILE"):
            labels([folder], 4, ["dog", *classes[:2], *classes[3:]])


def test_two_classes_may_have_one_name_but_no_folder_is_called_after_them() -> None:
    with pytest.raises(DataError, match=r"'crane' of data can be output 0 \(n02012849 crane\) or output 1 "):
        labels(["crane"], 2, ["n02012849 crane", "n03126707 crane"])
    classes = ["crane", "dog", "crane"]  # as in lists of ImageNet's names
    assert labels(["dog"], 3, classes).indices == {"dog": 1}
    with pytest.raises(DataError, match=r"can be output 0 \(crane\) or output 2 \(crane\); use names or WNIDs"):
        labels(["crane", "dog"], 3, classes)


@given(count=st.integers(2, 120), width=st.integers(0, 4), first=st.integers(0, 1))
def test_folders_that_are_called_by_numbers_are_in_their_order(count: int, width: int, first: int) -> None:
    folders = [f"{number:0{width}}" for number in range(first, first + count)]
    found = labels(sorted(folders), count)
    assert [found.indices[folder] for folder in folders] == list(range(count))
    (said,) = found.inferred
    assert folders[0] in said
    assert ("alphabetical order" in said) == (sorted(folders) != folders)


def test_numbers_below_zero_and_with_a_sign_are_numbers_and_very_long_ones_are_names() -> None:
    assert labels(["-1", "-10", "0", "1"], 4).indices == {"-10": 0, "-1": 1, "0": 2, "1": 3}
    assert labels(["+1", "+10", "+2"], 3).indices == {"+1": 0, "+2": 1, "+10": 2}
    assert labels(["1", "2", "9" * 5000], 3).indices == {"1": 0, "2": 1, "9" * 5000: 2}


@pytest.mark.parametrize("form", ["class{}", "class_{}", "{}_cat", "{}.0", "{} of 12", "fold 1 class {}"])
def test_where_names_hold_numbers_both_orders_are_said(form: str) -> None:
    folders = [form.format(number) for number in range(12)]
    (said,) = labels(folders, 12).inferred
    assert f"alphabetical order ({', '.join(sorted(folders)[:4])}" in said
    assert f"in the order of their numbers ({', '.join(folders[:4])}, ..., {folders[-1]}) needs --classes FILE" in said
    assert "needs" not in labels(folders[:10], 10).inferred[0]


def test_as_many_classes_as_outputs_are_to_be_named() -> None:
    with pytest.raises(DataError, match=r"the model has 3 outputs, but 2 classes are named \(cat, dog\)"):
        labels(["cat"], 3, ["cat", "dog"])


def test_fewer_numbers_than_outputs_are_outputs_where_they_count_from_0() -> None:
    assert labels(["0", "10", "9"], 12).indices == {"0": 0, "9": 9, "10": 10}
    with pytest.raises(DataError, match=r"3 folders with numbers from 1 to 10, the model 12 outputs, .* from 0 or 1"):
        labels(["1", "10", "9"], 12)
    with pytest.raises(DataError, match=r"two folders for one number \(01, 1\)"):
        labels(["0", "01", "1"], 3)
    assert labels(["5", "10", "7"], 3).indices == {"5": 0, "7": 1, "10": 2}


def test_as_many_folders_as_outputs_are_in_alphabetical_order_and_that_is_said() -> None:
    found = labels(["dog", "ant", "cat"], 3)
    assert found.indices == {"ant": 0, "cat": 1, "dog": 2}
    assert found.inferred == ("the outputs are taken for the folders in alphabetical order (ant, cat, dog)",)
    assert labels(["dog"], 1, ["dog"]).inferred == ()


def test_wnids_of_imagenet_need_no_file() -> None:
    for classes in (None, [f"class {number}" for number in range(1000)]):
        found = labels(["n15075141", "n01440764", "n01484850"], 1000, classes)
        assert found.indices == {"n01440764": 0, "n01484850": 2, "n15075141": 999}
        assert found.inferred == ("the folders are WNIDs: the outputs are taken for ImageNet's 1,000 classes",)
    assert imagenet_classes()[2] == "n01484850 great white shark"
    with pytest.raises(DataError, match=r"'n00000001' of data is no class"):
        labels(["n00000001"], 1000)


@pytest.mark.skipif(not WNIDS.exists(), reason="the shared data are not here")
def test_the_order_of_imagenets_classes_is_that_of_the_shared_list() -> None:
    assert [name.split()[0] for name in imagenet_classes()] == [name.split()[0] for name in read_classes(WNIDS)]
