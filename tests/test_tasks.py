"""Independent work: each task once, and never again what is finished."""

from pathlib import Path

import pytest

from robustdice.errors import ClusterError, OutputError
from robustdice.tasks import Checkpoint, run_tasks

KEYS = ["a", "b", "c"]


def test_results_come_in_the_order_of_the_keys_with_progress() -> None:
    told: list[tuple[int, int]] = []
    found = run_tasks(
        lambda context, item: context + item,
        KEYS,
        str.upper,
        "x",
        cost=lambda key: "abc".index(key) + 1,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert found == {"a": "xA", "b": "xB", "c": "xC"}
    assert list(found) == KEYS
    assert told == [(0, 6), (1, 6), (3, 6), (6, 6)]


def test_finished_tasks_are_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def work(_: None, item: str) -> str:
        if item == "c" and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(item)
        return item * 2

    with pytest.raises(KeyboardInterrupt):
        run_tasks(work, KEYS, str, None, checkpoint=Checkpoint(tmp_path / "kept", {"of": 1}))
    ran.append("again")
    found = run_tasks(work, KEYS, str, None, checkpoint=Checkpoint(tmp_path / "kept", {"of": 1}))
    assert ran == ["a", "b", "again", "c"]
    assert found == {"a": "aa", "b": "bb", "c": "cc"}


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    checkpoint = Checkpoint(path, {})
    checkpoint.add("a", [0.1, 1e-300])
    checkpoint.add("b", 2)
    path.write_bytes(path.read_bytes()[:-5])
    again = Checkpoint(path, {})
    assert again.get("a") == [0.1, 1e-300]
    assert again.get("b") is None
    again.add("b", 3)
    assert Checkpoint(path, {}).get("b") == 3
    again.delete()
    assert not path.exists()


def test_a_header_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    Checkpoint(path, {"of": 1})
    whole = path.read_bytes()
    for length in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        Checkpoint(path, {"of": 1})
        assert path.read_bytes() == whole


def test_a_result_that_was_changed_is_noticed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "kept", {})
    checkpoint.add("a", [1, 2, 3])
    (tmp_path / "kept").write_bytes((tmp_path / "kept").read_bytes().replace(b"[1, 2, 3]", b"[1, 2]"))
    with pytest.raises(OutputError, match="is not a checkpoint of robustdice, or damaged"):
        Checkpoint(tmp_path / "kept", {})


@pytest.mark.parametrize("content", [b"[1]\n", b"\xff\n", b"{}\n", b"text\n", b"\n", b"no line break"])
def test_other_files_are_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="is not a checkpoint"):
        Checkpoint(path, {})
    assert path.read_bytes() == content
    with pytest.raises(OutputError, match="cannot write"):
        Checkpoint(tmp_path / "none" / "kept", {})


def test_work_of_other_settings_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "kept", {"seed": 0, "samples": 3}).add("a", 1)
    with pytest.raises(OutputError, match=r"results of other work \(different: seed\); take another file"):
        Checkpoint(tmp_path / "kept", {"seed": 1, "samples": 3})


def test_work_of_which_nothing_was_done_is_forgotten(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "kept", {"seed": 0, "what": "a longer header than the next"})
    Checkpoint(tmp_path / "kept", {"seed": 1}).add("a", 1)
    assert Checkpoint(tmp_path / "kept", {"seed": 1}).get("a") == 1


def test_a_scheduler_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustdice.tasks.CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        run_tasks(lambda _, item: item, KEYS, str, None, recreate=lambda: None, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"address starts with tcp://, .* not 'nonsense'; start one with"):
        run_tasks(lambda _, item: item, KEYS, str, None, recreate=lambda: None, scheduler="nonsense")
