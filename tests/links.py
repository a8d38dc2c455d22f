"""Links that are slow or cut, for real processes in network namespaces (:mod:`robustdice.meter.netns`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from robustdice.errors import ClusterError
from robustdice.meter.netns import Switch, limit, namespaces, within, words


@contextlib.contextmanager
def shared_link(megabits: float | None, queue_ms: float = 50.0) -> Iterator[list[str]]:
    """The words to put in front of a command so that it runs behind a link of ``megabits`` per second (None: as fast as
    the machine). Everything that runs there shares it, as devices on one radio channel or behind one hub do. What is
    sent too fast waits up to ``queue_ms`` (that is the delay of the loaded link), and is dropped beyond."""
    with namespaces("link") as (name,):
        within(name, "ip", "link", "set", "lo", "mtu", "1500", "up")
        if megabits is not None:
            limit(name, "lo", megabits, queue_ms)
        yield words(name)


def cut_link(switch: Switch, source: int, target: int) -> None:
    """What one sends to another gets lost."""
    within(switch.members[source], "ip", "route", "add", "blackhole", f"{switch.address(target)}/32")


def heal_link(switch: Switch, source: int, target: int) -> None:
    """It arrives again."""
    with contextlib.suppress(ClusterError):
        within(switch.members[source], "ip", "route", "delete", "blackhole", f"{switch.address(target)}/32")
