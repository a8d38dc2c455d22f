"""What is said about a plan that was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import robustdice as rd
from robustdice.cost.model import Judge
from robustdice.cost.purpose import Purpose
from robustdice.report import considered as report
from robustdice.report import cost_tables, plots, tables
from robustdice.terminal import out, print_json

if TYPE_CHECKING:
    from robustdice.auto import Candidate


def show_plan(
    network: rd.Network,
    made: rd.Plan,
    output: Path,
    plot: Path | None,
    as_json: bool,
    images: rd.Dataset | None,
    judge: Judge,
    source: str,
    considered: Sequence[Candidate] = (),
    purpose: Purpose | None = None,
) -> None:
    """Write the plan, and say what it is, what it costs, and (method auto) what else there was. ``source`` says where
    the judge's profile comes from."""
    from robustdice.splits import plans_for_fewer  # noqa: PLC0415 -- it needs the workshop

    made.save(output)
    if plot is not None:
        plots.save(plots.holders(made), plot)
    outlook = cost_tables.Outlook(plans_for_fewer(network, made, judge), judge.profile, source, judge.link)
    if as_json:
        notes: dict[str, object] = {} if images is None else {"notes": images.notes.as_json()}
        if considered:
            notes["considered"] = report.considered_json(considered, judge)
            notes["why"] = report.considered_summary(considered, judge, purpose)
        notes["modelled"] = cost_tables.outlook_json(outlook)
        print_json({"output": str(output), **tables.plan_json(made), **notes})
        return
    if considered:
        out.print(report.considered_table(considered, judge))
        out.print(report.considered_summary(considered, judge, purpose))
    out.print(tables.plan_table(made))
    out.print(tables.plan_summary(made))
    out.print(cost_tables.outlook_table(outlook))
    out.print(cost_tables.outlook_summary(outlook))
    out.print(f"The plan is in {output}.")
