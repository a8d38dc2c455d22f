"""What a plan is chosen for: of those that keep nearly as much as the most accurate one, the fastest or smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from robustdice.cost.model import GOALS, Judge
from robustdice.cost.profile import Profile
from robustdice.errors import PlanError
from robustdice.plan import Plan

if TYPE_CHECKING:
    from robustdice.auto import Candidate

PURPOSES = (*GOALS, "memory")
"""What a plan can be chosen for: frames per second, seconds for a frame alone, or bytes of the largest device."""
TOLERATED = 0.02
"""How much less often a plan may answer like the intact network than the most accurate one does: in the worst failure
set of each size."""


@dataclass(frozen=True)
class Purpose:
    """One of :data:`PURPOSES`, and by what speeds are modelled; PlanError for another one."""

    name: str
    judge: Judge

    def __post_init__(self) -> None:
        if self.name not in PURPOSES:
            raise PlanError(f"nothing can be chosen for {self.name!r}; known: {', '.join(PURPOSES)}")

    @classmethod
    def of(cls, name: str, profile: Profile, link: float | None) -> Purpose:
        """For a device's profile and bits per second of its link."""
        return cls(name, Judge(profile, link, name if name in GOALS else "throughput"))

    def price(self, plan: Plan) -> float:
        """Seconds for a frame, of a stream or alone, or bytes of the largest device."""
        return float(max(plan.bytes_per_device)) if self.name == "memory" else self.judge.seconds(plan)


def nearly_best(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that keep to the budget and answer like the intact network at most ``TOLERATED`` less often than the most
    accurate one, in the worst failure set of each size."""
    fitting = [each for each in found if each.fits]
    if not fitting:
        return []
    least = [kept - TOLERATED - 1e-9 for kept in max(fitting, key=lambda each: each.merit).agreement]
    return [each for each in fitting if all(a >= b for a, b in zip(each.agreement, least, strict=True))]


def ordered_for(purpose: Purpose, found: Sequence[Candidate]) -> list[Candidate]:
    """The plan that is taken for the purpose first: the cheapest of :func:`nearly_best`, of equally cheap ones the most
    accurate; then the others of these, then the rest, the more accurate ones first."""
    near = nearly_best(found)
    chosen = sorted(near, key=lambda each: (purpose.price(each.plan), -each.merit, each.plan.memory_share))
    return [*chosen, *sorted((each for each in found if each not in near), key=lambda each: -each.merit)]
