"""Importance as a value: what it accepts, its normalisations, and its file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from robustdice.errors import OutputError, PlanError
from robustdice.importance.values import Importance, normalise
from robustdice.plan import ModelReference

MODEL = ModelReference(source="net.pt2", digest="ab" * 32, preprocessing={"mean": [0.5]})


def importance() -> Importance:
    rng = np.random.default_rng(0)
    return Importance(
        names=("features.0", "classifier/1"),
        scores=(rng.random((6, 3)), rng.random((4, 3)) * 1e-9),
        columns=("s1", "s2", "s3"),
        model=MODEL,
        settings={"s3": "exact", "samples": 64},
        provenance={"data": {"name": "digits"}, "seed": 0},
    )


def test_scores_are_read_only_copies() -> None:
    mine = np.ones((3, 1))
    value = Importance(names=("a",), scores=(mine,), columns=("s1",), model=MODEL)
    mine[0, 0] = 7
    assert value.scores[0][0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        value.scores[0][0, 0] = 2


def test_select_keeps_the_order_asked_for() -> None:
    value = importance()
    chosen = value.select(["s3", "s1"])
    assert chosen.columns == ("s3", "s1")
    assert (chosen.scores[1] == value.scores[1][:, [2, 0]]).all()
    assert (chosen.names, chosen.model, chosen.settings) == (value.names, value.model, value.settings)
    with pytest.raises(PlanError, match=r"no score 's2': these scores have s3, s1"):
        chosen.select(("s1", "s2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ("s1", "s9")}, "one or more of s1, s2, s3"),
        ({"columns": ()}, "one or more of s1, s2, s3"),
        ({"columns": ("s1", "s1")}, "each once"),
        ({"columns": ("s1",)}, r"layer a: scores must be \[units, 1\], got \[2, 2\]"),
        ({"names": ("a", "b")}, "scores for 1 layers, but 2 names"),
        ({"scores": (np.zeros((0, 2)),)}, r"got \[0, 2\]"),
        ({"scores": (np.zeros(2),)}, r"got \[2\]"),
        ({"scores": (np.array([[0, 1], [2, np.nan]]),)}, "score s2 of unit 1 is nan"),
        ({"scores": (np.array([[np.inf, 1]]),)}, "score s1 of unit 0 is inf"),
    ],
)
def test_refuses_what_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    fields = {"names": ("a",), "scores": (np.zeros((2, 2)),), "columns": ("s1", "s2"), "model": MODEL}
    with pytest.raises(PlanError, match=message):
        Importance(**{**fields, **changes})


def test_file_roundtrip(tmp_path: Path) -> None:
    value = importance()
    value.save(tmp_path / "scores.npz")
    loaded = Importance.load(tmp_path / "scores.npz")
    assert loaded.digest == value.digest
    assert (loaded.names, loaded.columns, loaded.model) == (value.names, value.columns, value.model)
    assert loaded.settings == value.settings
    assert loaded.provenance == value.provenance == {"data": {"name": "digits"}, "seed": 0}
    for mine, its in zip(value.scores, loaded.scores, strict=True):
        assert (mine == its).all()
        assert not its.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_digest_covers_everything() -> None:
    value = importance()
    fields = {name: getattr(value, name) for name in ("names", "scores", "columns", "model", "settings")}
    others: list[dict[str, Any]] = [
        {"names": ("features.0", "b")},
        {"scores": (value.scores[0], value.scores[1] * 2)},
        {"columns": ("s1", "s3", "s2")},
        {"model": ModelReference(source="net.pt2", digest="cd" * 32)},
        {"settings": {}},
    ]
    digests = [Importance(**{**fields, **other}).digest for other in ({}, *others)]
    assert digests[0] == value.digest
    assert len(set(digests)) == len(digests)
    moved = ModelReference(source="elsewhere/net.pt2", digest=MODEL.digest, preprocessing=MODEL.preprocessing)
    assert Importance(**{**fields, "model": moved, "provenance": {"seed": 1}}).digest == digests[0]


def test_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another place"):
        importance().save(tmp_path / "missing" / "scores.npz")


def rewritten(content: bytes, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]) -> bytes:
    with np.load(io.BytesIO(content)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    target = io.BytesIO()
    encoded = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(target, header=encoded, **arrays)
    return target.getvalue()


def _other_version(header: dict[str, Any], _: dict[str, NDArray[Any]]) -> None:
    header["version"] = 9


def _other_format(header: dict[str, Any], _: dict[str, NDArray[Any]]) -> None:
    header["format"] = "something else"


def _no_columns(header: dict[str, Any], _: dict[str, NDArray[Any]]) -> None:
    del header["columns"]


def _other_model(header: dict[str, Any], _: dict[str, NDArray[Any]]) -> None:
    header["model"] = {"colour": "red"}


def _other_scores(_: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    arrays["scores_0"] = arrays["scores_0"] + 1


def _missing_scores(_: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    del arrays["scores_1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_version, "has scores format version 9, this version reads 2"),
        (_other_format, "no robustdice-importance header"),
        (_no_columns, "columns"),
        (_other_model, "colour"),
        (_other_scores, "does not have the digest"),
        (_missing_scores, "scores_1"),
    ],
)
def test_refuses_files_that_say_something_else(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "scores.npz"
    importance().save(path)
    path.write_bytes(rewritten(path.read_bytes(), change))
    with pytest.raises(PlanError, match=message) as error:
        Importance.load(path)
    assert "robustdice score" in str(error.value)


def test_refuses_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    importance().save(path)
    good = path.read_bytes()
    foreign = io.BytesIO()
    np.savez(foreign, a=np.zeros(3))
    pickled = io.BytesIO()
    np.savez(pickled, header=np.array([{"a": 1}], dtype=object))
    for content in (b"", b"text", good[:100], good[:-40], foreign.getvalue(), pickled.getvalue()):
        path.write_bytes(content)
        with pytest.raises(PlanError, match="robustdice score"):
            Importance.load(path)
    with pytest.raises(PlanError, match=r"cannot read the scores .*No such file"):
        Importance.load(tmp_path / "absent.npz")
    with pytest.raises(PlanError, match=r"cannot read the scores .*directory"):
        Importance.load(tmp_path)


def test_any_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    value = importance()
    path = tmp_path / "scores.npz"
    value.save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 150):
        damaged = bytearray(good)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            loaded = Importance.load(path)
        except PlanError:
            continue
        assert loaded.digest == value.digest  # a byte of the zip container that nobody reads


columns = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20).map(lambda values: np.array(values)[:, None])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(columns, st.sampled_from(["minmax", "rank"]))
def test_normalised_scores_lie_between_0_and_1_and_keep_their_order(column: NDArray[np.float64], how: str) -> None:
    scaled = normalise(column, how)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert (np.diff(scaled[np.argsort(column[:, 0], kind="stable"), 0]) >= 0).all()
    if how == "minmax":
        assert set(scaled[[column.argmin(), column.argmax()], 0]) <= {0.0, 1.0}


def test_normalisations_by_hand() -> None:
    scores = np.array([[1.0, 7.0], [3.0, 7.0], [3.0, 7.0], [5.0, 7.0]])
    assert normalise(scores).tolist() == [[0, 0], [0.5, 0], [0.5, 0], [1, 0]]
    assert normalise(scores, "rank")[:, 0].tolist() == [0, 0.5, 0.5, 1]
    assert normalise(scores, "none").tolist() == scores.tolist()
    assert normalise(np.array([[4.0]]), "rank").tolist() == [[0]]
    with pytest.raises(PlanError, match="unknown normalisation 'z'; known: minmax, rank, none"):
        normalise(scores, "z")
