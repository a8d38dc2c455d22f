"""What a reproduction found, as rows for tables and as verdicts on the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustdice.failure.evaluate import Evaluation
from robustdice.importance.values import COLUMNS, Importance
from robustdice.plan.certificate import wilson
from robustdice.report import paper


@dataclass(frozen=True)
class ModelResults:
    """Figure 2's evaluations by number of devices, one per method; Table I's by scores and what was kept the same.

    ``source`` is the model's; ``as_in_paper`` when the paper has numbers for it. Table I is of the largest number of
    devices, and empty where RobustDiCE was not compared. ``doubt`` is why the accuracies may say little.
    """

    name: str
    source: str
    as_in_paper: bool
    scored_with: str
    scores: Importance
    figure2: dict[int, list[Evaluation]]
    table1: dict[tuple[str, str], Evaluation]
    scored_apart: bool = False
    doubt: str | None = None

    @property
    def trained(self) -> bool:
        """Whether the weights are the model's own: accuracies of random ones say nothing."""
        return self.scores.model.random_weights_seed is None


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
            "samples": evaluation.samples,
            **dict(zip(("worst_low", "worst_high"), wilson(summary.worst, evaluation.samples), strict=True)),
        }
        for model in results
        for devices, evaluations in model.figure2.items()
        for evaluation in evaluations
        for failed, summary in evaluation.by_size.items()
        if failed
    ]


def table1_rows(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """``table1.csv``: top-1 on the largest number of devices with one down, for every subset of the scores."""
    return [
        {
            "model": model.name,
            "scores": scores,
            "same": same,
            "worst": evaluation.by_size[1].worst,
            "mean": evaluation.by_size[1].mean,
            "memory_share": evaluation.memory_share,
            "devices": evaluation.devices,
            "samples": evaluation.samples,
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
            "method": evaluation.method,
            "memory_share": evaluation.memory_share,
            "paper": paper.MEMORY[model.source].get(devices, "")
            if model.as_in_paper and evaluation.method == "robustdice"
            else "",
        }
        for model in results
        for devices, evaluations in model.figure2.items()
        for evaluation in evaluations
    ]


def scenario_name(devices: int) -> str:
    """The paper's name for a number of devices, of which every number but all can be down."""
    letter = {4: "A", 3: "B", 2: "C"}.get(devices)
    return f"{devices} devices" if letter is None else f"{letter}, {devices} devices"


def trends(results: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """The paper's claims about what was compared, each with whether it holds for a model (with trained weights), and
    where it does not."""
    verdicts = []
    for model in filter(lambda model: model.trained, results):
        rows = {(r["devices"], r["failed"], r["method"]): r for r in figure2_rows([model])}
        cases = sorted({key[:2] for key in rows}, key=lambda case: (-case[0], case[1]))

        def below(
            a: str, b: str, chosen: list[tuple[int, int]], of_a: str = "mean", of_b: str = "mean", rows: Any = rows
        ) -> list[str]:
            return [f"{d} devices, {f} down" for d, f in chosen if rows[d, f, a][of_a] < rows[d, f, b][of_b]]

        one, more = [c for c in cases if c[1] == 1], [c for c in cases if c[1] > 1]
        claims: list[tuple[str, list[str]]] = []
        compared = {method for _, _, method in rows}
        if {"robustdice", "lop"} <= compared:
            claims += [
                ("RobustDiCE is not below LOP (mean)", below("robustdice", "lop", cases)),
                ("RobustDiCE's worst case is not below LOP's best", below("robustdice", "lop", cases, "worst", "best")),
            ]
        if "cdc" in compared:
            off = [d for d, f in one if abs(rows[d, f, "cdc"]["worst"] - rows[d, f, "cdc"]["clean"]) > 1e-9]
            claims.append(("CDC is exact with one device down", [f"{d} devices" for d in off]))
        if {"robustdice", "cdc"} <= compared and more:
            claims.append(("RobustDiCE is not below CDC beyond one (mean)", below("robustdice", "cdc", more)))
        if model.table1:
            worst = {scores: e.by_size[1].worst for (scores, same), e in model.table1.items() if same == "memory"}
            better = [f"{score} alone" for score in COLUMNS if worst[score] > worst["s1+s2+s3"]]
            claims.append(("three scores are not below one at the same memory (worst, one down)", better))
        verdicts += [{"model": model.name, "claim": claim, "holds": not f, "fails": f} for claim, f in claims]
    return verdicts
