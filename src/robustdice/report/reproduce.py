"""The paper's evaluation on any models: Table I, Figure 2, the memory column of Table II.

Everything that takes time is kept in ``OUT/work``, so that the same command goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from robustdice.failure.chance import doubt_about
from robustdice.failure.evaluate import Evaluation, evaluate_plans
from robustdice.files import write_atomically, write_csv
from robustdice.plan import Plan
from robustdice.progress import Progress, silent
from robustdice.report import page, plots
from robustdice.report.comparison import Choices, Subject, check_memory, figure2_plans, table1_plans
from robustdice.report.kept import check_names, claim, kept_scores, settings_of
from robustdice.report.results import ModelResults, figure2_rows, scenario_name, table1_rows, table2_rows, trends


def reproduce(
    subjects: Sequence[Subject],
    out: Path,
    choices: Choices | None = None,
    *,
    scheduler: str | None = None,
    about: Mapping[str, str] | None = None,
    on_progress: Progress = silent,
) -> list[ModelResults]:
    """Run all experiments and write ``figure2`` (.csv, .png, .svg), ``table1.csv``, ``table2.csv`` and
    ``report.html`` to ``out``; ``about`` says on the page what it was made with (date, machine, command, ...).

    PlanError when the memory is too little; OutputError when ``out`` holds work of other settings.
    """
    choices = choices or Choices()
    check_names(subjects)
    for subject in subjects:
        check_memory(subject, choices)
    for subject in subjects:
        claim(out / "work" / subject.name, settings_of(subject, choices))
    results = []
    steps = len(choices.devices) + 2  # scores, the numbers of devices, Table I
    for number, subject in enumerate(subjects):

        def advance(step: int, first: int = number * steps) -> Progress:
            every = len(subjects) * steps
            return lambda done, total: on_progress(1000 * (first + step) + 1000 * done // max(1, total), 1000 * every)

        results.append(_run(subject, out / "work" / subject.name, choices, scheduler, advance))
    _write(results, out, about or {})
    return results


def _run(
    subject: Subject, work: Path, choices: Choices, scheduler: str | None, advance: Callable[[int], Progress]
) -> ModelResults:
    network = subject.network
    scores = kept_scores(subject, work, choices.s3, scheduler, advance(0))

    def evaluated(plans: Sequence[Plan], what: str, step: int, max_failed: int | None = None) -> list[Evaluation]:
        return evaluate_plans(
            network,
            plans,
            subject.dataset,
            max_failed=max_failed,
            seed=choices.seed,
            scheduler=scheduler,
            checkpoint=work / f"{what}.partial",
            on_progress=advance(step),
        )

    plans, all_three = figure2_plans(subject, scores, choices)
    figure2 = {}
    for step, (devices, of_size) in enumerate(plans.items(), start=1):
        found = evaluated(list(of_size.values()), f"{devices}-devices", step)
        figure2[devices] = [replace(one, method=name) for name, one in zip(of_size, found, strict=True)]
    table = table1_plans(subject, scores, choices, all_three)
    found = evaluated(list(table.values()), "table1", len(plans) + 1, max_failed=1) if table else []
    return ModelResults(
        name=subject.name,
        source=network.reference.source,
        as_in_paper=subject.as_in_paper and network.reference.random_weights_seed is None,
        scored_with=subject.scoring.name,
        scored_apart=subject.scored_apart,
        doubt=doubt_about(
            next(iter(figure2.values()))[0], network.outputs, network.reference.random_weights_seed is not None
        ),
        scores=scores,
        figure2=figure2,
        table1=dict(zip(table, found, strict=True)),
    )


def _write(results: Sequence[ModelResults], out: Path, about: Mapping[str, str]) -> None:
    tables = {"figure2": figure2_rows(results), "table1": table1_rows(results), "table2": table2_rows(results)}
    for name, rows in tables.items():
        if not rows:  # no Table I without RobustDiCE
            (out / f"{name}.csv").unlink(missing_ok=True)
            continue
        write_csv(out / f"{name}.csv", rows)
    devices = results[0].figure2
    figure = plots.scenarios(
        {model.name: model.figure2 for model in results}, {number: scenario_name(number) for number in devices}
    )
    for suffix in ("png", "svg"):
        plots.save(figure, out / f"figure2.{suffix}")
    content = page.render(results, trends(results), (out / "figure2.svg").read_text(), about)
    write_atomically(out / "report.html", content.encode())
