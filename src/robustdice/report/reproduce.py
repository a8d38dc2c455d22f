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


@dataclass(frozen=True)
class ModelResults:
    """Figure 2's evaluations by number of devices, one per method; Table I's by scores and what was kept the same.

    ``source`` is the model's; ``as_in_paper`` when the paper has numbers for it.
    """

    name: str
    source: str
    as_in_paper: bool
    scored_with: str
    scores: Importance
    figure2: dict[int, list[Evaluation]]
    table1: dict[tuple[str, str], Evaluation]

    @property
    def trained(self) -> bool:
        """Whether the weights are the model's own: accuracies of random ones say nothing."""
        return self.scores.model.random_weights_seed is None


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
    data = [subject.dataset.digest, subject.scoring.digest]
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


def figure2_rows(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """``figure2.csv``: a row for each model, number of devices, number of failures and method."""
    return [
        {
            "model": model.name,
            "devices": devices,
            "failed": failed,
            "method": evaluation.method,
            "worst": summary.worst,
            "mean": summary.mean,
            "best": summary.best,
            "clean": evaluation.clean,
            "memory_share": evaluation.memory_share,
        }
        for model in results
        for devices, evaluations in model.figure2.items()
        for evaluation in evaluations
        for failed, summary in evaluation.by_size.items()
        if failed
    ]


def table1_rows(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """``table1.csv``: top-1 on 4 devices with one down, for every subset of the scores."""
    return [
        {
            "model": model.name,
            "scores": scores,
            "same": same,
            "worst": evaluation.by_size[1].worst,
            "mean": evaluation.by_size[1].mean,
            "memory_share": evaluation.memory_share,
        }
        for model in results
        for (scores, same), evaluation in model.table1.items()
    ]


def table2_rows(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """``table2.csv``: the largest device's memory over full replication's, ours and the paper's."""
    return [
        {
            "model": model.name,
            "devices": devices,
            "memory_share": evaluations[0].memory_share,
            "paper": MEMORY[model.source][devices] if model.as_in_paper else "",
        }
        for model in results
        for devices, evaluations in model.figure2.items()
    ]


def trends(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """The paper's claims, each with whether it holds for a model (with trained weights), and where it does not."""
    verdicts = []
    for model in filter(lambda model: model.trained, results):
        rows = {(r["devices"], r["failed"], r["method"]): r for r in figure2_rows([model])}
        cases = sorted({key[:2] for key in rows}, key=lambda case: (-case[0], case[1]))

        def below(
            a: str, b: str, chosen: list[tuple[int, int]], of_a: str = "mean", of_b: str = "mean", rows: Any = rows
        ) -> list[str]:
            return [f"{d} devices, {f} down" for d, f in chosen if rows[d, f, a][of_a] < rows[d, f, b][of_b]]

        one, more = [c for c in cases if c[1] == 1], [c for c in cases if c[1] > 1]
        inexact = [
            f"{d} devices" for d, f in one if abs(rows[d, f, "cdc"]["worst"] - rows[d, f, "cdc"]["clean"]) > 1e-9
        ]
        three = model.table1["s1+s2+s3", "memory"].by_size[1].worst
        singles = [s for s in COLUMNS if model.table1[s, "memory"].by_size[1].worst > three]
        for claim, fails in (
            ("RobustDiCE is not below LOP (mean)", below("robustdice", "lop", cases)),
            ("RobustDiCE's worst case is not below LOP's best", below("robustdice", "lop", cases, "worst", "best")),
            ("CDC is exact with one device down", inexact),
            ("RobustDiCE is not below CDC beyond one (mean)", below("robustdice", "cdc", more)),
            ("three scores are not below one at the same memory (worst, one down)", [f"{s} alone" for s in singles]),
        ):
            verdicts.append({"model": model.name, "claim": claim, "holds": not fails, "fails": fails})
    return verdicts


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
