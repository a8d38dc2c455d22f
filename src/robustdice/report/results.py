"""What a reproduction found, as rows for tables and as verdicts on the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustdice.failure.evaluate import Evaluation
from robustdice.importance.values import COLUMNS, Importance
from robustdice.report.paper import MEMORY


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
