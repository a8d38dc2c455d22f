"""The report of a reproduction: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robustdice.report.paper import ACCURACY
from robustdice.report.results import ModelResults

STYLE = """body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;
text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"""


def render(
    results: Sequence[ModelResults],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    trends: Sequence[Mapping[str, Any]],
    figure: str,
    command: str,
) -> str:
    """The whole page. Accuracies are measured; what the paper says stands beside them where it is known."""
    sources = {model.name: model.source for model in results if model.as_in_paper}
    first = results[0].figure2[4][0]
    figure2 = [
        {
            **row,
            "paper": ACCURACY.get((sources.get(row["model"]), row["devices"], row["failed"], row["method"]), ""),
        }
        for row in tables["figure2"]
    ]
    about = [
        f"Measured: top-1 accuracy on {first.samples:,} images of {first.data}, every failure set of each size.",
        "The paper's figures are worst cases for RobustDiCE and best cases for LOP: compare with that column.",
        *(f"{m.name}: {_described(m)}." for m in results),
        "CDC with one device down is exact by construction: what it repairs counts as there. That the sums do give the "
        "slices, to rounding, is what 'robustdice verify' shows of a build.",
        f"robustdice {version('robustdice')}, torch {version('torch')}. Command: {command}",
    ]
    claims = [
        {"model": t["model"], "claim": t["claim"], "holds": "yes" if t["holds"] else "no: " + ", ".join(t["fails"])}
        for t in trends
    ]
    parts = [
        "<h1>RobustDiCE: the paper's evaluation</h1>",
        *(f"<p>{escape(line)}</p>" for line in about),
        "<h2>Do the paper's trends hold?</h2>",
        _table(claims) if claims else "<p>These weights are random: nothing to claim.</p>",
        "<h2>Figure 2: accuracy under failures</h2>",
        figure[figure.index("<svg") :],
        _table(figure2),
        "<h2>Table I: which scores (4 devices, one down)</h2>",
        "<p>At the same threshold more scores mean larger distances, hence more replicas: see the memory.</p>",
        _table([{**row, "paper": _of_table1(sources.get(row["model"]), row)} for row in tables["table1"]]),
        "<h2>Table II: memory of the largest device over full replication</h2>",
        _table(tables["table2"]),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>RobustDiCE</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _described(model: ModelResults) -> str:
    how = model.scores.settings
    source = model.source if "/" not in model.source else Path(model.source).name
    classes = f" ({how['s3_classes']})" if "s3_classes" in how else ""
    images = f"{how['samples']} images of {model.scored_with}, without labels"
    weights = "" if model.trained else " with random weights, whose accuracy says nothing"
    return f"{source}{weights}, scored with {images}: s3 {how['s3']}{classes}"


def _of_table1(source: str | None, row: Mapping[str, Any]) -> float | str:
    """The paper's number, which is for the same threshold."""
    every = row["scores"] == "s1+s2+s3" and row["same"] == "threshold"
    return ACCURACY.get((source, 4, 1, "robustdice"), "") if every else ""


def _cell(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)
