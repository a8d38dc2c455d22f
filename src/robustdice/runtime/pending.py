"""A client's frame that is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robustdice.runtime.wire.messages import Answer


@dataclass
class Pending:
    """A frame without a result yet."""

    number: int
    array: NDArray[np.float32]
    sent_at: float
    among: int
    """Frames that were under way when it left, it included."""
    asked: dict[int, float] = field(default_factory=dict)
    """Devices that the frame was sent to, and when."""
    answers: dict[int, tuple[Answer, float]] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    first_at: float | None = None
    """When the first answer came."""

    @property
    def waiting(self) -> list[int]:
        """Devices that were asked and have said nothing about it yet."""
        return [d for d in self.asked if d not in self.answers and d not in self.refusals]

    @property
    def coverages(self) -> dict[int, float]:
        """What the answers so far cover."""
        return {device: answer.coverage for device, (answer, _) in self.answers.items()}
