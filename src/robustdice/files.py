"""Writing files so that a reader finds the old content or the new, never half of it; reading arrays of anybody's."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdice.errors import OutputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path`` and move it there; OutputError, and no rubbish left, when that fails.

    What a link leads to is written, and the link stays one; a device or a pipe is written to, and not replaced.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        place = Path(os.path.realpath(path))  # which a link to itself is no error for
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(place)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place with -o") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, at least one, as CSV under a line of headings; OutputError as above."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_json(content: bytes) -> Any:
    """The document of a JSON file in UTF-8; ValueError for anything else, such as what nests too deep, or texts with
    halves of characters, which nothing can be written to."""
    try:
        text = content.decode("utf-8-sig")
        document = json.loads(text)
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deep") from None
    return document


def read_array(content: bytes) -> NDArray[Any]:
    """The array of a ``.npy`` file that is not pickled; ValueError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header as Python 2 wrote it is read, and nobody's business
            found: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (TokenError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError, EOFError) as error:
        # NumPy reads the header as Python's words, and makes room for as much as that says.
        raise ValueError(f"no array: {error}") from None
    return found
