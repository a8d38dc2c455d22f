"""The report of a reproduction: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from robustdice.failure.evaluate import Evaluation
from robustdice.markup import html_table
from robustdice.plan.certificate import wilson
from robustdice.report import paper
from robustdice.report.results import ModelResults, scenario_name
from robustdice.report.tables import NOTHING_TO_CLAIM

STYLE = """body{font:15px/1.5 sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;
text-align:right;vertical-align:top}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}
small{color:#666;display:block}.best{font-weight:bold}.missing{color:#999}dt{font-weight:bold}"""

HEADINGS = {"robustdice": "RobustDiCE", "lop": "LOP (slices)", "cdc": "CDC (sums)", "full": "Full replication"}
UNKNOWN = '<span class="missing">not at hand</span>'


def render(
    results: Sequence[ModelResults], trends: Sequence[Mapping[str, Any]], figure: str, about: Mapping[str, str]
) -> str:
    """The whole page. Accuracies are measured; what the paper says stands beside them where it is known."""
    first = next(iter(results[0].figure2.values()))[0]
    ours_only = not any(model.as_in_paper for model in results)
    intro = [
        f"Measured: top-1 accuracy on {first.samples:,} images of {first.data}, every failure set of each size: the "
        "worst, in brackets the 95 % confidence interval (Wilson) that so many images give, and mean and best below. "
        "The best worst case of a row is bold, full replication aside.",
        *(f"{model.name}: {_described(model)}." for model in results),
        *(f"Warning, {model.name}: {model.doubt}." for model in results if model.doubt is not None),
        "CDC with one device down is exact by construction: what it repairs counts as there. That the sums do give the "
        "slices, to rounding, is what 'robustdice verify' shows of a build.",
    ]
    claims = [(t["model"], t["claim"], "yes" if t["holds"] else "no: " + ", ".join(t["fails"])) for t in trends]
    parts = [
        "<h1>RobustDiCE: the paper's evaluation</h1>",
        *(f"<p>{escape(line)}</p>" for line in intro),
        "" if ours_only else f"<p>{escape(_of_the_paper())}</p>",
        described_as(about),
        "<h2>Do the paper's trends hold?</h2>",
        html_table(("Model", "Claim", "Holds"), [[*map(escape, claim)] for claim in claims])
        if claims
        else f"<p>{NOTHING_TO_CLAIM}</p>",
        "<h2>Figure 2: accuracy under failures</h2>",
        figure[figure.index("<svg") :],
        *(f"<h3>{escape(model.name)}</h3>{_figure2(model)}" for model in results),
        _table1(results),
        "<h2>Table II: memory of the largest device over full replication</h2>",
        *(f"<h3>{escape(model.name)}</h3>{_table2(model)}" for model in results),
    ]
    return as_page(parts)


def described_as(about: Mapping[str, str]) -> str:
    """What results were made with."""
    entries = (f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in about.items())
    return f"<h2>Made with</h2><dl>{''.join(entries)}</dl>"


def as_page(parts: Sequence[str]) -> str:
    """A file of these parts."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>RobustDiCE</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _figure2(model: ModelResults) -> str:
    """A row per scenario, the methods side by side, and the paper's numbers behind them."""
    methods = list(dict.fromkeys(one.method for of_size in model.figure2.values() for one in of_size))
    head = ["Scenario", *map(heading, methods)]
    if model.as_in_paper:
        head += ["The paper's RobustDiCE, worst", "The paper's LOP, best"]
    rows = []
    for devices, evaluations in model.figure2.items():
        by_method = {one.method: one for one in evaluations}
        for failed in range(1, devices):
            compared = [one.by_size[failed].worst for one in evaluations if one.method != "full"]
            best = max(compared, default=1.0)
            row = [escape(f"{scenario_name(devices)}, {failed} down")]
            for method in methods:
                one = by_method.get(method)
                row.append("not compared" if one is None else _accuracies(one, failed, best))
            if model.as_in_paper:
                row += [_known(paper.ACCURACY.get((model.source, devices, failed, m))) for m in ("robustdice", "lop")]
            rows.append(row)
    return html_table(head, rows)


def _accuracies(evaluation: Evaluation, failed: int, best: float) -> str:
    summary = evaluation.by_size[failed]
    worst = _measured(summary.worst, evaluation.samples)
    marked = evaluation.method != "full" and summary.worst == best
    spread = f"mean {_percent(summary.mean)}, best {_percent(summary.best)}"
    sampled = f" (of {summary.sets} of {summary.of:,} sets)" if summary.sampled else ""
    return f"{_best(worst) if marked else worst}<small>{spread}{sampled}</small>"


def _table1(results: Sequence[ModelResults]) -> str:
    """A row per subset of the scores, the models side by side."""
    shown = [model for model in results if model.table1]
    if not shown:
        return ""
    head = ["Scores"]
    for model in shown:
        head += [f"{model.name}, same threshold", f"{model.name}, same memory"]
        head += [f"{model.name}, the paper"] if model.as_in_paper else []
    best = {
        (model.name, same): max(one.by_size[1].worst for (_, kept), one in model.table1.items() if kept == same)
        for model in shown
        for same in ("threshold", "memory")
    }
    rows = []
    for scores in dict.fromkeys(scores for scores, _ in shown[0].table1):
        row = [escape(scores)]
        for model in shown:
            for same in ("threshold", "memory"):
                one = model.table1[scores, same]
                worst = _measured(one.by_size[1].worst, one.samples)
                marked = one.by_size[1].worst == best[model.name, same]
                row.append(f"{_best(worst) if marked else worst}<small>memory {_percent(one.memory_share)}</small>")
            if model.as_in_paper:
                every = scores == "s1+s2+s3"
                row.append(_known(paper.ACCURACY.get((model.source, one.devices, 1, "robustdice")) if every else None))
        rows.append(row)
    devices = next(iter(shown[0].table1.values())).devices
    return (
        f"<h2>Table I: which scores ({devices} devices, one down, worst case)</h2>"
        "<p>At the same threshold more scores mean larger distances, hence more replicas: see the memory. "
        f"The paper's are for the same threshold.</p>{html_table(head, rows)}"
    )


def _table2(model: ModelResults) -> str:
    methods = list(dict.fromkeys(one.method for of_size in model.figure2.values() for one in of_size))
    head = ["Devices", *map(heading, methods)]
    if model.as_in_paper:
        head.append("The paper's RobustDiCE, of a running process")
    rows = []
    for devices, evaluations in model.figure2.items():
        shares = {one.method: _percent(one.memory_share) for one in evaluations}
        row = [str(devices), *(shares.get(method, "not compared") for method in methods)]
        if model.as_in_paper:
            row.append(_known(paper.MEMORY[model.source].get(devices)))
        rows.append(row)
    return html_table(head, rows)


def _of_the_paper() -> str:
    low, high = paper.PARAMETERS[4]
    clean = ", ".join(f"{name.partition(':')[2]} {_percent(value)}" for name, value in paper.CLEAN.items())
    shares = "/".join(f"{100 * paper.MEMORY[name][4]:.1f}" for name in paper.MODELS)
    return (
        "The paper's accuracies are worst cases for RobustDiCE and best cases for LOP. Its memory, "
        f"{shares} % on four devices, is that of running processes: full replication of AlexNet takes "
        f"{paper.FULL_ALEXNET_MEGABYTES} MB there, which two bytes a parameter and 30 to 40 MB of everything else "
        f"explain. Of the parameters alone that leaves {100 * low:.0f} to {100 * high:.0f} % on four devices, by our "
        "estimate: hence two columns of RobustDiCE, one with the paper's share taken as one of the parameters, one at "
        f"{100 * high:.0f} %. The models alone, in the paper: {clean}. {paper.NOT_AT_HAND}"
    )


def _described(model: ModelResults) -> str:
    how = model.scores.settings
    source = model.source if "/" not in model.source else Path(model.source).name
    classes = f" ({how['s3_classes']})" if "s3_classes" in how else ""
    apart = "" if model.scored_apart else ", which may be among those that it is evaluated on"
    images = f"{how['samples']} images of {model.scored_with}, without labels{apart}"
    weights = "" if model.trained else " with random weights, whose accuracy says nothing"
    first = next(iter(model.figure2.values()))[0]
    return f"{source}{weights}, alone {_percent(first.clean)}, scored with {images}: s3 {how['s3']}{classes}"


def heading(method: str) -> str:
    """What a method is called at the head of its figures."""
    name, _, rest = method.partition(" ")
    return f"{HEADINGS.get(name, name)} {rest}".strip() + (" of the parameters" if rest else "")


def _measured(accuracy: float, samples: int) -> str:
    low, high = wilson(accuracy, samples)
    return f"{_percent(accuracy)} [{100 * low:.1f} to {100 * high:.1f}]"


def _best(text: str) -> str:
    return f'<span class="best">{text}</span>'


def _known(share: float | None) -> str:
    return UNKNOWN if share is None else _percent(share)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
