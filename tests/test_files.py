"""Where results are written: into the file that was named, and into nothing else."""

import os
import threading
from pathlib import Path

import pytest

from robustdice.errors import OutputError
from robustdice.files import write_atomically


def test_a_link_stays_a_link_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "plan.json").write_bytes(b"old")
    (tmp_path / "plan.json").symlink_to("kept/plan.json")
    write_atomically(tmp_path / "plan.json", b"new")
    assert (tmp_path / "plan.json").is_symlink()
    assert (tmp_path / "kept" / "plan.json").read_bytes() == b"new"
    assert list((tmp_path / "kept").iterdir()) == [tmp_path / "kept" / "plan.json"]
    (tmp_path / "later").symlink_to("kept/later")
    write_atomically(tmp_path / "later", b"new")
    assert (tmp_path / "kept" / "later").read_bytes() == b"new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"content")
    reader.join(10)
    assert read == [b"content"]
    assert pipe.is_fifo()


def test_a_pipe_without_a_name_is_written_to() -> None:
    read, write = os.pipe()
    write_atomically(Path(f"/dev/fd/{write}"), b"content")
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"content"


def test_what_cannot_be_written_is_left_alone_and_named(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    for path in (tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(OutputError, match=f"cannot write {path}: .*; choose another place with -o"):
            write_atomically(path, b"content")
    assert list(tmp_path.iterdir()) == [tmp_path / "self"]
    write_atomically(tmp_path / "self", b"content")
    assert (tmp_path / "self").read_bytes() == b"content"
