"""Importance scores as a value: what scoring produces and partitioning reads. NumPy only.

On disk an Importance is one ``.npz`` file: ``header``, UTF-8 JSON as a uint8 array (format, version,
digest, names, columns, model, settings, provenance), and ``scores_0``, ``scores_1``, ...: float64 [units, columns],
one array per name, in order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import PlanError
from robustdice.files import read_array, read_json, write_atomically
from robustdice.markup import html_table
from robustdice.plan import ModelReference

FORMAT_VERSION = 2
COLUMNS = ("s1", "s2", "s3")
"""L1 norm, connection sensitivity, removal divergence (paper, section III-A)."""
SCORING_SAMPLES = 64
"""How many images are scored with unless somebody says otherwise."""
NORMALISATIONS = ("minmax", "rank", "none")
LIMIT_BYTES = 2**28
"""Of all scores together, unpacked: a file of a few kilobytes can say that it holds a terabyte."""
SIGNIFICANT_BITS = 20
"""Of the largest score of a layer and column, and so of all others: float32 has 24, sums of them a few less."""

Scores = NDArray[np.float64]
"""float64 [units, columns]: the scores of one layer. A unit is what is dealt out, a neuron or, in a
grouped convolution, a whole group of them."""


@dataclass(frozen=True)
class Importance:
    """How important every unit of every layer is.

    ``names`` are the layers' names and ``scores`` their scores, float64 [units, columns], read-only;
    ``columns`` says which scores these are, in order. ``model`` is what was scored, ``settings`` how (method,
    samples), ``provenance`` with what (data, seed, versions). PlanError when they do not fit together or a score is not
    finite.
    """

    names: tuple[str, ...]
    scores: tuple[Scores, ...]
    columns: tuple[str, ...]
    model: ModelReference
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(_read_only(scores) for scores in self.scores))
        _check(self)

    def select(self, columns: Sequence[str]) -> Importance:
        """The same scores with these columns only, in this order; PlanError when one is not there."""
        if missing := [name for name in columns if name not in self.columns]:
            raise PlanError(
                f"there is no score {missing[0]!r}: these scores have {', '.join(self.columns)}; "
                "choose among them, or score the model again"
            )
        chosen = [self.columns.index(name) for name in columns]
        return Importance(
            names=self.names,
            scores=tuple(scores[:, chosen] for scores in self.scores),
            columns=tuple(columns),
            model=self.model,
            settings=self.settings,
            provenance=self.provenance,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the scores and of what is said about them, without their provenance and without where the
        model's file lies."""
        header = _header(self)
        del header["provenance"], header["model"]["source"]
        sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for scores in self.scores:
            sha.update(f"{scores.shape}".encode() + scores.astype("<f8").tobytes())
        return sha.hexdigest()

    def __repr__(self) -> str:
        units = sum(map(len, self.scores))
        what = f"{units:,} units in {len(self.names)} layers of {self.model.source}"
        return f"<Importance {', '.join(self.columns)} of {what}>"

    def _repr_html_(self) -> str:
        """For notebooks: each layer's median and largest scores."""
        rows = [
            [escape(name), str(len(scores)), *(f"{np.median(column):.3g}, {column.max():.3g}" for column in scores.T)]
            for name, scores in zip(self.names, self.scores, strict=True)
        ]
        return html_table(["layer", "units", *self.columns], rows, f"{repr(self)[1:-1]}: median, largest")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one file; OutputError when that is not possible."""
        header = json.dumps({**_header(self), "digest": self.digest}).encode()
        arrays = {f"scores_{index}": scores for index, scores in enumerate(self.scores)}
        content = io.BytesIO()
        np.savez_compressed(content, header=np.frombuffer(header, dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        write_atomically(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read scores; PlanError when the file is missing, damaged or of another version."""
        return _load(Path(path))


def rounded(scores: Scores) -> Scores:
    """Scores [units, columns] without the last bits, which depend on the order of sums: multiples of a power of two,
    about a millionth of the largest of each column."""
    _, exponent = np.frexp(np.abs(scores).max(axis=0))
    step = np.ldexp(1.0, exponent - SIGNIFICANT_BITS)
    result: Scores = np.round(scores / step) * step
    return result


def normalise(scores: Scores, how: str = "minmax") -> Scores:
    """Bring the scores of one layer, [units, columns], to a common scale, column by column.

    ``minmax``: linearly to [0, 1], a constant column to 0. ``rank``: to the rank among the layer's units
    over the largest one, the mean rank for ties. ``none``: as they are. PlanError for anything else.
    """
    if how == "none":
        return scores
    if how == "minmax":
        lowest = scores.min(axis=0)
        span = scores.max(axis=0) - lowest
        scaled: Scores = (scores - lowest) / np.where(span > 0, span, 1.0)
        return scaled
    if how == "rank":
        return np.stack([_ranks(column) for column in scores.T], axis=1)
    raise PlanError(f"unknown normalisation {how!r}; known: {', '.join(NORMALISATIONS)}")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    ranks: NDArray[np.float64] = mean_rank[position] / max(len(values) - 1, 1)
    return ranks


def _read_only(scores: NDArray[Any]) -> Scores:
    copy = np.array(scores, dtype=np.float64, order="C")
    copy.flags.writeable = False
    return copy


def _check(importance: Importance) -> None:
    columns = importance.columns
    if not columns or len(set(columns)) != len(columns) or not set(columns) <= set(COLUMNS):
        raise PlanError(f"scores must be one or more of {', '.join(COLUMNS)}, each once; got {columns}")
    if len(importance.names) != len(importance.scores):
        raise PlanError(f"scores for {len(importance.scores)} layers, but {len(importance.names)} names")
    for name, scores in zip(importance.names, importance.scores, strict=True):
        if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] != len(columns):
            raise PlanError(f"layer {name}: scores must be [units, {len(columns)}], got {list(scores.shape)}")
        if not np.isfinite(scores).all():
            unit, column = np.argwhere(~np.isfinite(scores))[0]
            raise PlanError(
                f"layer {name}: score {columns[column]} of unit {unit} is {scores[unit, column]}, not a finite "
                "number; look for NaN or infinity in the model's weights and images"
            )


def _header(importance: Importance) -> dict[str, Any]:
    return {
        "format": "robustdice-importance",
        "version": FORMAT_VERSION,
        "names": list(importance.names),
        "columns": list(importance.columns),
        "model": asdict(importance.model),
        "settings": dict(importance.settings),
        "provenance": dict(importance.provenance),
    }


def _real(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"scores of type {array.dtype}")
    return array


def _load(path: Path) -> Importance:
    remedy = "make new scores with 'robustdice score'"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read the scores {path}: {error.strerror}; {remedy}") from None
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise PlanError(f"{path} is not a file of scores (it is not .npz); {remedy}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > LIMIT_BYTES:
                raise ValueError(f"{size} bytes when they are unpacked, at most {LIMIT_BYTES} are read")
            arrays = {name.removesuffix(".npy"): read_array(archive.read(name)) for name in archive.namelist()}
        header = read_json(arrays["header"].tobytes())
        if header.get("format") != "robustdice-importance":
            raise PlanError(f"{path} is not a file of scores (no robustdice-importance header); {remedy}")
        if header.get("version") != FORMAT_VERSION:
            found = header.get("version")
            raise PlanError(f"{path} has scores format version {found}, this version reads {FORMAT_VERSION}; {remedy}")
        importance = Importance(
            names=tuple(map(str, header["names"])),
            scores=tuple(_real(arrays[f"scores_{index}"]) for index in range(len(header["names"]))),
            columns=tuple(map(str, header["columns"])),
            model=ModelReference(**header["model"]),
            settings=dict(header["settings"]),
            provenance=dict(header["provenance"]),
        )
        digest = header["digest"]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, MemoryError) as error:
        raise PlanError(f"{path} is damaged ({error}); {remedy}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{path} is not a file of scores ({type(error).__name__}: {error}); {remedy}") from None
    if importance.digest != digest:
        raise PlanError(f"{path} does not have the digest that it states: it was changed by hand; {remedy}")
    return importance
