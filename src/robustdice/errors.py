"""Everything that can go wrong, as one tree.

Each message names the value that was found, the one that was expected, and the way out::

    RobustdiceError
    ├── ModelError      a model cannot be found, loaded, exported or placed
    ├── DataError       images cannot be found or do not fit the model
    ├── PlanError       a plan cannot be made, read, or does not fit what it is used with
    ├── BundleError     a bundle is incomplete, corrupt, foreign, or of another plan
    ├── ClusterError    devices cannot be reached, started or agree
    ├── MessageError    bytes from the network are not a message of this cluster
    │   └── OtherBuildError     they are one of another plan, or of another version of the protocol
    └── OutputError     a result cannot be written
"""

from __future__ import annotations


class RobustdiceError(Exception):
    """Root of the tree: the command line prints its message as one line and exits with status 1."""


class ModelError(RobustdiceError):
    """A model cannot be found, loaded, exported or placed."""


class DataError(RobustdiceError):
    """Images cannot be found or do not fit the model."""


class PlanError(RobustdiceError):
    """A plan cannot be made, read, or does not fit what it is used with."""


class BundleError(RobustdiceError):
    """A bundle is incomplete, corrupt, foreign, or of another plan."""


class ClusterError(RobustdiceError):
    """Devices cannot be reached, started or agree."""


class MessageError(RobustdiceError):
    """Bytes from the network are not a message of this cluster."""


class OtherBuildError(MessageError):
    """A message of another plan, or of another version of the protocol."""


class OutputError(RobustdiceError):
    """A result cannot be written."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, as far as it fits into a message of ours: the first line, and those
    behind a line that ends in a colon, each cut to some length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":"):
        return lines[0]
    shown = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..." for line in lines[: _MOST_LINES + 1]]
    more = f" ({len(lines) - len(shown)} more lines)" if len(lines) > len(shown) else ""
    return f"{shown[0]} {'; '.join(shown[1:])}{more}"


_LONGEST_LINE, _MOST_LINES = 200, 4
"""How many characters of how many lines of another library's list are shown."""


_WORKSHOP = frozenset({"torch", "torchvision", "onnx", "onnxscript", "sklearn", "timm", "distributed", "matplotlib"})


def workshop_missing(error: ModuleNotFoundError) -> RobustdiceError | None:
    """What to say where only the device side is installed; None when something else is missing."""
    name = (error.name or "").split(".")[0]
    if name not in _WORKSHOP:
        return None
    return RobustdiceError(
        f"{name} is not installed here. Devices do without it; models, scores, plans, evaluations and builds need it: "
        "pip install 'robustdice[workshop]' (README, Installing)"
    )
