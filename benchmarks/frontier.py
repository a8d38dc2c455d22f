"""The accuracy that a byte buys under failures: `plan --method auto` beside everything that it has to beat.

    python benchmarks/frontier.py [NAME ...] [--only METHOD ...] [--images N] [--out DIR]

For each of the shared models (those of these names), at each budget, the accuracy of the worst failure set of every
size. What is finished is kept in ``DIR/points.csv``, and the same command goes on from there; when all is measured, or
with ``--draw`` at once, it draws a picture for each model and number of failures and writes the tables beside it.
``--resident`` measures what memory the processes of a device take, of plans that are made.

Plans are made from images of the training data alone, through the functions that the commands call, with the images
that the commands take; accuracies are of images that nothing else has seen. The ImageNet sample is no training data:
one half of its images is for making plans, the other for measuring them.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier_competitors import Competitors, Entry
from frontier_report import AUTO, REFINED, expecting, write_report
from numpy.typing import NDArray

import robustdice as rd
from robustdice.auto import Table, tabulate
from robustdice.errors import PlanError
from robustdice.files import write_csv
from robustdice.model.network import Network
from robustdice.plan import Plan
from robustdice.plan.certificate import wilson
from robustdice.provenance import commit, processor
from robustdice.representation import ROUNDING_SAMPLES, TRIAL_SAMPLES
from robustdice.workshop import choose_from

WORK = Path(__file__).parents[1] / "build" / "frontier"
SHARED = Path(__file__).parents[2] / "shared"
DEVICES = 4
RESIDENT_AT = (0.06, 0.1, 0.25)
"""Budgets at which device processes are measured."""
REFINED_WITH, PASSES = 1024, 5
"""Images and passes of ``calibrate --passes``."""
BUDGETS = (
    *(0.03, 0.035, 0.04, 0.045, 0.05, 0.055, 0.06, 0.065, 0.07, 0.08),
    *(0.09, 0.1, 0.11, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
)


@dataclass(frozen=True)
class Subject:
    """A model with its data: ``train`` to make plans from, ``test`` to measure them on."""

    name: str
    train: Path
    test: Path


def subjects(names: list[str], shared: Path, work: Path) -> Iterator[Subject]:
    """Those of the shared models that are asked for, or all."""
    for model in ("resnet20", "alexnet", "convnext_small", "vgg16_bn_half"):
        if not names or f"{model}_cifar10" in names:
            yield Subject(f"{model}_cifar10", *(shared / "data" / f"cifar10-{of}.zip" for of in ("train", "test")))
    if not names or "mobilenet_v2_imagenet" in names:
        halves = work / "imagenet-a.zip", work / "imagenet-b.zip"
        divide(shared / "data" / "imagenet-sample.zip", halves)
        yield Subject("mobilenet_v2_imagenet", *halves)


def divide(source: Path, halves: tuple[Path, Path]) -> None:
    """Every other image of a zip file into each of two."""
    with zipfile.ZipFile(source) as archive:
        images = sorted(name for name in archive.namelist() if not name.endswith("/"))
        for number, half in enumerate(halves):
            with zipfile.ZipFile(half, "w") as written:
                for name in images[number::2]:
                    written.writestr(zipfile.ZipInfo(name), archive.read(name))


class Points:
    """What is measured, a row for each plan and number of failures, in a CSV file."""

    def __init__(self, path: Path) -> None:
        """Those that are in the file already."""
        self._path = path
        self.rows = read_csv(path)

    def has(self, model: str, entry: Entry) -> bool:
        """Whether an entry's plan is measured."""
        wanted = (model, entry.method, entry.variant, _text(entry.budget))
        return any((r["model"], r["method"], r["variant"], r["budget"]) == wanted for r in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep more of them."""
        self.rows += rows
        write_csv(self._path, self.rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(budget: float | None) -> str:
    return "" if budget is None else str(budget)


def autos(
    network: Network,
    images: NDArray[np.float32],
    others: NDArray[np.float32] | None,
    more: NDArray[np.float32],
    budgets: tuple[float, ...],
) -> Iterator[Entry]:
    """What ``plan --method auto`` answers with, for any number of failures and with ``--survive`` for fewer; where
    something can be lost, also what ``calibrate --passes`` makes of the first with ``more`` images."""

    @cache
    def table(survive: int) -> Table:
        if survive < DEVICES - 1:
            return replace(table(DEVICES - 1), survive=survive)  # it holds for fewer failures too
        return tabulate(network, images, devices=DEVICES, others=others)

    @cache
    def answer(budget: float, survive: int = DEVICES - 1) -> Plan:
        return choose_from(table(survive), budget)[0].plan

    def refined(budget: float) -> Plan:
        if not answer(budget).corrections:
            raise PlanError("nothing can be lost of what auto answers with")
        return rd.calibrate(network, answer(budget), more, passes=PASSES)

    for budget in budgets:
        yield Entry(AUTO, "", budget, partial(answer, budget))
    for survive in range(DEVICES - 1):
        for budget in budgets:
            yield Entry(AUTO, expecting(survive), budget, partial(answer, budget, survive))
    for budget in budgets:
        yield Entry(REFINED, f"{len(more)} images, {PASSES} passes", budget, partial(refined, budget))


def measured(subject: Subject, network: Network, test: rd.Dataset, entry: Entry, keep: Path) -> list[dict[str, Any]]:
    """An entry's rows; its plan is kept in a directory."""
    start = time.process_time()
    plan: Plan = entry.make()
    taken = time.process_time() - start
    plan.save(kept_plan(keep, subject.name, entry.method, entry.variant, entry.budget))
    result = rd.evaluate(network, plan, test)
    rows = []
    for failed, summary in result.by_size.items():
        low, high = wilson(summary.worst, result.samples)
        rows.append(
            {
                "model": subject.name,
                "method": entry.method,
                "variant": entry.variant,
                "budget": _text(entry.budget),
                "share": round(plan.memory_share, 5),
                "device_bytes": max(plan.bytes_per_device),
                "down": failed,
                "worst": round(summary.worst, 5),
                "low": round(low, 5),
                "high": round(high, 5),
                "mean": round(summary.mean, 5),
                "clean": round(result.clean, 5),
                "images": result.samples,
                "plan_cpu_seconds": round(taken, 1),
                "commit": commit() or "unknown",
                "machine": machine(),
            }
        )
    return rows


def machine() -> str:
    """What this is measured on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, 1 thread"
    return f"{where}, PyTorch {torch.__version__}"


def resident(network: Network, plan: Plan) -> tuple[int, int]:
    """What the device process that takes most has resident after ten frames, and had at most, beyond what it had
    before it read its bundle."""
    frame = np.zeros(network.input_shape, np.float32)
    with tempfile.TemporaryDirectory() as directory:
        build = rd.build(network, plan, Path(directory) / "build")
        with rd.LocalCluster(build, timeout_seconds=10) as cluster:
            for _ in range(10):
                cluster.infer(frame)
            statuses = cluster.client.status().values()
    now, most = (
        max(each[key] - each["empty_rss_bytes"] for each in statuses) for key in ("rss_bytes", "peak_rss_bytes")
    )
    return int(now), int(most)


def residents(subject: Subject, network: Network, work: Path) -> Iterator[dict[str, Any]]:
    """A row for the whole network, and for each of ``auto``'s plans at some budgets that is made."""
    plans = {"whole, float32": rd.partition(network, devices=DEVICES, method="full")}
    for budget in RESIDENT_AT:
        path = kept_plan(work, subject.name, "auto", "", budget)
        if path.exists():
            plans[f"auto at {100 * budget:g} %"] = Plan.load(path)
    for name, plan in plans.items():
        now, most = resident(network, plan)
        yield {
            "model": subject.name,
            "plan": name,
            "device_bytes": max(plan.bytes_per_device),
            "resident_bytes": now,
            "peak_bytes": most,
            "commit": commit() or "unknown",
        }


def kept_plan(work: Path, model: str, method: str, variant: str, budget: float | None) -> Path:
    """Where a plan is kept."""
    return work / (" ".join(filter(None, (model, method, variant, _text(budget)))).replace(" ", "-") + ".json")


def main() -> None:
    """Measure what is not measured yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (all five)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="measure these methods alone, and draw nothing")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="shares of the float32 bytes")
    parser.add_argument("--images", type=int, default=500, help="images to measure accuracies on")
    parser.add_argument("--shared", type=Path, default=SHARED, help="where models/ and data/ are")
    parser.add_argument("--work", type=Path, default=WORK, help="where plans are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "frontier")
    parser.add_argument("--resident", action="store_true", help="measure device processes, of plans that are made")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    points = Points(options.out / "points.csv")
    budgets = tuple(options.budgets)
    memory = read_csv(options.out / "resident.csv")
    for subject in () if options.draw else subjects(options.names, options.shared, options.work):
        network = rd.load_model(str(options.shared / "models" / f"{subject.name}.pt2"))
        if options.resident:
            memory = [row for row in memory if row["model"] != subject.name]
            memory += residents(subject, network, options.work)
            write_csv(options.out / "resident.csv", memory)
            continue
        every = rd.load_data(str(subject.train), network.preprocessing, network.outputs, split="train", labelled=False)
        train, others = every.sample(ROUNDING_SAMPLES + TRIAL_SAMPLES).divide(ROUNDING_SAMPLES)
        more = every.sample(REFINED_WITH)
        test = rd.load_data(str(subject.test), network.preprocessing, network.outputs).sample(options.images)
        images = train.images()
        entries = [
            *autos(network, images, others.images() if len(others) else None, more.images(), budgets),
            *Competitors(network, images, DEVICES, budgets).entries(),
        ]
        for entry in entries:
            if points.has(subject.name, entry) or (options.only and entry.method not in options.only):
                continue
            try:
                rows = measured(subject, network, test, entry, options.work)
            except PlanError as error:
                print(f"{subject.name}, {entry.method}, {entry.budget}: {error}", file=sys.stderr, flush=True)
                continue
            points.add(rows)
            figures = " / ".join(f"{100 * row['worst']:.1f}" for row in rows)
            print(
                f"{subject.name}, {entry.method} {entry.variant} {_text(entry.budget)}: "
                f"{100 * rows[0]['share']:.2f} % hold, {figures}; {rows[0]['plan_cpu_seconds']} s for the plan",
                flush=True,
            )
    if not options.only:
        write_report(points.rows, memory, options.out)


if __name__ == "__main__":
    main()
