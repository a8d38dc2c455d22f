"""What was measured of a plan: accuracy for every failure set, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FailureSet = frozenset[int]

CONFIDENCE_Z = 1.959964
"""Standard deviations to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Certificate:
    """Top-1 accuracy (fractions) on ``samples`` images of the data set ``data`` with ``data_digest``: of the
    unpartitioned float32 model (``clean``), and of the plan for each failure set. ValueError for anything else."""

    data: str
    data_digest: str
    samples: int
    clean: float
    accuracy: Mapping[FailureSet, float]

    def __post_init__(self) -> None:
        if self.samples < 1 or not all(0 <= value <= 1 for value in (self.clean, *self.accuracy.values())):
            raise ValueError("a certificate has accuracies between 0 and 1 on at least one image")

    def expected(self, failed: Iterable[int]) -> float | None:
        """The accuracy that was measured for a failure set, or None where nobody has."""
        return self.accuracy.get(frozenset(failed))

    def interval(self, failed: Iterable[int]) -> tuple[float, float] | None:
        """The 95 % confidence interval of :meth:`expected`."""
        found = self.expected(failed)
        return None if found is None else wilson(found, self.samples)

    def to_json(self) -> dict[str, Any]:
        """As plans and manifests store it."""
        return {
            "data": self.data,
            "data_digest": self.data_digest,
            "samples": self.samples,
            "clean": self.clean,
            "accuracy": {",".join(map(str, sorted(failed))): value for failed, value in self.accuracy.items()},
        }

    @classmethod
    def from_json(cls, document: Any) -> Certificate | None:
        """The inverse of :meth:`to_json`, None of None; KeyError, TypeError or ValueError when it is no certificate."""
        if document is None:
            return None
        return cls(
            data=str(document["data"]),
            data_digest=str(document["data_digest"]),
            samples=int(document["samples"]),
            clean=float(document["clean"]),
            accuracy={
                frozenset(int(device) for device in failed.split(",") if device): float(value)
                for failed, value in document["accuracy"].items()
            },
        )


def wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share that was measured on ``samples`` (Wilson 1927):
    unlike the textbook's, it is no point at 0 and 1."""
    z2 = CONFIDENCE_Z**2 / samples
    middle = (share + z2 / 2) / (1 + z2)
    half = CONFIDENCE_Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))
