"""Four devices behind a switch of 1 Gbit/s and of 100 Mbit/s, by model, split and what travels.

    python benchmarks/bench_network.py [--models NAME ...] [--splits ...] [--wires ...] [--megabits ...] [--window N]
        [--rounds N] [--seconds S] [--builds DIR] [--out FILE]

Every device is in a network namespace of its own, on a port of a bridge that carries so much either way; the client's
port is as fast as the machine. All share two cores. Frames per second are shown as a share of what bounds them: what
the same devices reach behind a switch that is as fast as the machine (all four computing on the two cores), or what a
port can carry of the bytes that the busiest device sends or receives for a frame, its input included, headers and
encryption not. Needs root; where namespaces are not permitted it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
from pathlib import Path

from builds import SPLITS, Builds, name_of, try_build
from paired import Results, spread

from robustdice.cost.model import handed_over
from robustdice.meter.apart import behind, running
from robustdice.meter.netns import Switch, one_switch, permitted
from robustdice.meter.throughput import BenchResult
from robustdice.plan import Plan
from robustdice.wire_format import WIRES

DEVICES = 4


def link_bytes(plan: Plan, input_shape: tuple[int, ...]) -> float:
    """Bytes that the busiest device sends, or receives, for a frame. Without exchanges frames go to devices in turn."""
    exchanging = any(map(plan.exchanged, range(len(plan.layers))))
    sent, received = 0.0, 4.0 * math.prod(input_shape) / (1 if exchanging else plan.devices)
    for index in range(len(plan.layers)):
        if values := plan.exchanged(index):
            published = handed_over(plan, index) * plan.exchanged_bytes(index) / values
            sent += published.max() * (plan.devices - 1)
            received += published.sum() - published.min()
    return max(sent, received)


def measure(build: Path, title: str, options: argparse.Namespace, where: Switch, results: Results) -> None:
    """Print a line for each link."""
    plan = Plan.load(build / "plan.json")
    manifest = json.loads((build / "device-0" / "manifest.json").read_text())
    needed = 8e-6 * link_bytes(plan, tuple(manifest["input_shape"]))
    links: list[float | None] = [None, *options.megabits]
    found: dict[float | None, list[BenchResult]] = {link: [] for link in links}
    with running(build, behind(where, DEVICES)) as devices:
        for number in range(options.rounds):
            for link in links if number % 2 else reversed(links):
                where.limit(range(DEVICES), link)
                found[link].append(devices.measure(seconds=options.seconds, window=options.window))
    for link in options.megabits:
        shares, rates, bounds = [], [], []
        for free, limited in zip(found[None], found[link], strict=True):
            bound = min(free.frames_per_second, link / needed)
            rates.append(limited.frames_per_second)
            bounds.append(bound)
            shares.append(limited.frames_per_second / bound)
        computing = "link" if link / needed < min(free.frames_per_second for free in found[None]) else "computing"
        coverage = min(each.coverage for each in found[link])
        unanswered = max(each.unanswered / each.images for each in found[link])
        results.say(
            f"{title}, {link:g} Mbit/s: {spread(rates)} frames/s of {spread(bounds)} ({computing}; "
            f"{needed / 8:.2f} MB a frame), share {spread(shares)}, coverage {coverage:.3f}, "
            f"unanswered {unanswered:.3f}"
        )


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg16_bn", "convnext_tiny"], metavar="NAME")
    parser.add_argument("--splits", nargs="+", default=["neurons", "auto"], choices=SPLITS)
    parser.add_argument("--wires", nargs="+", default=list(WIRES), choices=WIRES)
    parser.add_argument("--megabits", nargs="+", type=float, default=[1000.0, 100.0])
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--builds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if reason := permitted():
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that namespaces are removed
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as temporary, one_switch(DEVICES + 1) as where:
        builds = Builds(options.builds or Path(temporary))
        for model in options.models:
            for split in options.splits:
                for wire in options.wires:
                    hosts = tuple(map(where.address, range(DEVICES)))
                    if build := try_build(builds, model, split, DEVICES, wire=wire, hosts=hosts):
                        measure(build, f"{name_of(model)}, {split}, {wire}", options, where, results)


if __name__ == "__main__":
    main()
