"""The paper's evaluation on any models: Table I, Figure 2, the memory column of Table II.

Everything that takes time is kept in ``OUT/work``, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robustdice.errors import ModelError, OutputError, PlanError
from robustdice.failure.evaluate import Evaluation, evaluate_plans
from robustdice.files import write_atomically
from robustdice.importance.score import check_s3, score
from robustdice.importance.values import COLUMNS, Importance
from robustdice.model.data import Dataset
from robustdice.model.network import Network
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.report import page, plots
from robustdice.report.paper import MEMORY
from robustdice.report.results import ModelResults, figure2_rows, table1_rows, table2_rows, trends
from robustdice.workshop import partition

SCENARIOS = {4: "A", 3: "B", 2: "C"}
"""Numbers of devices and the paper's names for them; every number of them but all can be down."""
METHODS = ("robustdice", "lop", "cdc", "full")
SUBSETS = tuple(subset for size in (1, 2, 3) for subset in itertools.combinations(COLUMNS, size))
STEPS = len(SCENARIOS) + 2
"""Of the work on a model: scores, the scenarios, Table I."""


@dataclass(frozen=True)
class Subject:
    """A model, and the images that it is scored with (no labels are used) and evaluated on.

    ``as_in_paper`` when model and images are the paper's: then the memory is, too.
    """

    name: str
    network: Network
    scoring: Dataset
    dataset: Dataset
    as_in_paper: bool = False


def reproduce(
    subjects: Sequence[Subject],
    out: Path,
    *,
    memory: float = 0.5,
    s3: str = "auto",
    seed: int = 0,
    scheduler: str | None = None,
    command: str = "",
    on_progress: Progress = silent,
) -> list[ModelResults]:
    """Run all experiments and write ``figure2`` (.csv, .png, .svg), ``table1.csv``, ``table2.csv`` and
    ``report.html`` to ``out``.

    What is as in the paper gets its memory for each number of devices. Others get ``memory`` (a share) on 4 devices,
    and the threshold that gives it on 3 and 2 as well: the paper's three shares are what one threshold gives.
    PlanError when ``memory`` is too little or ``s3`` unknown; OutputError when ``out`` holds work of other settings.
    """
    names = [subject.name for subject in subjects]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ModelError(f"two models are called {twice.pop()!r}; rename a file, or run them one after the other")
    check_s3(s3)
    for subject in subjects:
        least = partition(subject.network, devices=max(SCENARIOS), method="lop").memory_share
        if not subject.as_in_paper and memory < least:
            raise PlanError(
                f"{max(SCENARIOS)} devices hold {least:.1%} of {subject.name} each without any replica: "
                f"say --memory {math.ceil(100 * least) / 100 + 0.01:.2f} or more, not {memory}"
            )
    for subject in subjects:
        _claim(out / "work" / subject.name, _settings(subject, memory, s3, seed))
    results = []
    for number, subject in enumerate(subjects):

        def advance(step: int, first: int = number * STEPS) -> Progress:
            every = len(subjects) * STEPS
            return lambda done, total: on_progress(1000 * (first + step) + 1000 * done // max(1, total), 1000 * every)

        results.append(_run(subject, out / "work" / subject.name, memory, s3, seed, scheduler, advance))
    _write(results, out, command)
    return results


def _settings(subject: Subject, memory: float, s3: str, seed: int) -> dict[str, Any]:
    """Everything that a model's results depend on."""
    network = subject.network
    # What is evaluated is known image by image in the checkpoints, so that one of them can be repaired.
    data = [subject.dataset.name, len(subject.dataset), subject.scoring.digest]
    return {
        "robustdice": version("robustdice"),
        "model": network.reference.digest,
        "data": data,
        "memory": "the paper's" if subject.as_in_paper else memory,
        "s3": s3,
        "seed": seed,
    }


def _claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory of a model's finished work; OutputError when what it holds was made with other settings."""
    file = work / "settings.json"
    try:
        work.mkdir(parents=True, exist_ok=True)
        begun = any(work.glob("scores*"))
        found = json.loads(file.read_bytes()) if begun and file.exists() else settings
    except OSError as error:
        raise OutputError(f"cannot write {work}: {error.strerror}; choose another place with -o") from None
    except ValueError:
        found = None
    if found != settings:
        raise OutputError(
            f"{work} holds results of other settings (model, data, --samples, --memory, --s3 or --seed); "
            "choose another place with -o, or delete it to start again"
        )
    write_atomically(file, json.dumps(settings).encode())


def _run(
    subject: Subject,
    work: Path,
    memory: float,
    s3: str,
    seed: int,
    scheduler: str | None,
    advance: Callable[[int], Progress],
) -> ModelResults:
    network = subject.network
    kept, partial = work / "scores.npz", work / "scores.partial"
    if kept.exists():
        scores = Importance.load(kept)
    else:
        scores = score(network, subject.scoring, s3=s3, scheduler=scheduler, checkpoint=partial, on_progress=advance(0))
        scores.save(kept)
    partial.unlink(missing_ok=True)

    def robust(devices: int, **how: Any) -> Plan:
        return partition(network, scores, devices=devices, **how)

    def evaluated(plans: list[Plan], what: str, step: int, max_failed: int | None = None) -> list[Evaluation]:
        return evaluate_plans(
            network,
            plans,
            subject.dataset,
            max_failed=max_failed,
            seed=seed,
            scheduler=scheduler,
            checkpoint=work / f"{what}.partial",
            on_progress=advance(step),
        )

    figure2 = {}
    shares = MEMORY[network.reference.source] if subject.as_in_paper else None
    four = robust(4, memory=shares[4] if shares else memory)
    threshold = float(four.settings["thresholds"][0])  # float() knows "inf"
    for step, devices in enumerate(SCENARIOS, start=1):
        ours = robust(devices, memory=shares[devices]) if shares else robust(devices, threshold=threshold)
        others = [partition(network, devices=devices, method=method) for method in METHODS[1:]]
        figure2[devices] = evaluated([ours, *others], f"{devices}-devices", step)
    table = {}
    for subset in SUBSETS:
        table["+".join(subset), "threshold"] = robust(4, threshold=threshold, columns=subset)
        table["+".join(subset), "memory"] = robust(4, memory=four.memory_share, columns=subset)
    found = evaluated(list(table.values()), "table1", len(SCENARIOS) + 1, max_failed=1)
    return ModelResults(
        name=subject.name,
        source=network.reference.source,
        as_in_paper=subject.as_in_paper and network.reference.random_weights_seed is None,
        scored_with=subject.scoring.name,
        scores=scores,
        figure2=figure2,
        table1=dict(zip(table, found, strict=True)),
    )


def _write(results: Sequence[ModelResults], out: Path, command: str) -> None:
    tables = {
        "figure2": figure2_rows(results),
        "table1": table1_rows(results),
        "table2": table2_rows(results),
    }
    for name, rows in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / f"{name}.csv", text.getvalue().encode())
    figure = plots.scenarios({model.name: model.figure2 for model in results}, SCENARIOS)
    for suffix in ("png", "svg"):
        plots.save(figure, out / f"figure2.{suffix}")
    content = page.render(results, tables, trends(results), (out / "figure2.svg").read_text(), command)
    write_atomically(out / "report.html", content.encode())
