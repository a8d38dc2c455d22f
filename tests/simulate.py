"""Simulated clusters by the thousand: ``python tests/simulate.py --seeds 100000``.

Every seed is a scenario (tests/scenarios.py): devices, a plan, and faults at random moments. A seed that fails is
printed with its reason; ``--replay SEED`` shows what happens in it, ``--replay SEED --shrink`` the shortest schedule of
faults that still fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from robustdice.progress import shown
from scenarios import Scenario, draw, failure, play, shrink

AT_ONCE = 20
"""Seeds that a process is given at a time."""


def failures(first: int, count: int) -> list[tuple[int, str]]:
    """The seeds from ``first`` on that fail, and why."""
    found = ((seed, failure(draw(seed))) for seed in range(first, first + count))
    return [(seed, why) for seed, why in found if why is not None]


def sweep(first: int, seeds: int, jobs: int, show: bool) -> list[tuple[int, str]]:
    """All failing seeds of ``seeds``, by ``jobs`` processes."""
    starts = range(first, first + seeds, AT_ONCE)
    counts = [min(AT_ONCE, first + seeds - start) for start in starts]
    found = []
    with ProcessPoolExecutor(jobs) as pool, shown(f"{seeds} seeds", show) as tell:
        for done, some in enumerate(pool.map(failures, starts, counts), 1):
            for seed, why in some:
                print(f"\nseed {seed}: {why}", flush=True)
            found += some
            tell(min(done * AT_ONCE, seeds), seeds)
    return found


def described(scenario: Scenario) -> str:
    """A scenario for people: its settings in one line, its faults in one each."""
    settings = ", ".join(f"{key}={value}" for key, value in asdict(scenario).items() if key != "faults")
    faults = [
        f"  {fault.start:6.3f} s to {fault.end:6.3f} s: {fault.kind}, device {fault.device}, other {fault.other}, "
        f"strength {fault.strength:.2f}"
        for fault in sorted(scenario.faults, key=lambda fault: fault.start)
    ]
    return "\n".join([settings, *(faults or ["  no fault"])])


def replay(seed: int, smaller: bool, events: bool) -> int:
    """Show what happens in a seed; 1 when it fails."""
    scenario, log = draw(seed), list[str]()
    why = failure(scenario)
    if why is not None and smaller:
        scenario = shrink(scenario)
    print(described(scenario))
    try:
        world = play(scenario, log)
    except Exception as error:
        print("\n".join(log if events else log[-20:]))
        print(f"fails: {error}")
        return 1
    if events:
        print("\n".join(log))
    for at, device, text in world.notes:
        print(f"  {at:8.4f} s, device {device}: {text}")
    print(f"holds; {len(world.sent)} frames in {world.now:.1f} s, trace {world.trace}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="show one seed instead")
    parser.add_argument("--shrink", action="store_true", help="with --replay: only what it takes to fail")
    parser.add_argument("--events", action="store_true", help="with --replay: every event")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return replay(options.replay, options.shrink, options.events)
    started = time.monotonic()
    found = sweep(options.first, options.seeds, options.jobs, sys.stderr.isatty())
    seconds = time.monotonic() - started
    print(f"{options.seeds} seeds from {options.first} on in {seconds:.0f} s: {len(found)} fail")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
