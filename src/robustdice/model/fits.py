"""Whether a plan is one for a network."""

from __future__ import annotations

from robustdice.errors import PlanError
from robustdice.model.network import Network
from robustdice.model.pairs import possible_pairs
from robustdice.model.strips import ROWS, region_of, strips_between
from robustdice.plan import Plan


def check_plan_fits(network: Network, plan: Plan) -> None:
    """PlanError unless ``plan`` was made for ``network``."""
    planned, found = plan.model, network.reference
    if planned.digest != found.digest:
        raise PlanError(
            f"the plan was made for {planned.source} (digest {planned.digest[:12]}), "
            f"not for {found.source} (digest {found.digest[:12]}); make a new plan with 'robustdice plan'"
        )
    if plan.layers != network.plan_layers or plan.shared_weights != network.shared_weights:
        raise PlanError(
            f"the plan has other layers than this version finds in {found.source}; "
            "make a new plan with 'robustdice plan'"
        )
    possible = possible_pairs(network)
    for first, second in plan.pairs.items():
        if possible.get(first) != second:
            names = " and ".join(plan.layers[index].name for index in (first, second))
            raise PlanError(
                f"layers {names} cannot be dealt out as a pair: the one is not read by the other alone; "
                "make a new plan with 'robustdice plan'"
            )
    for run in plan.strips:
        region = region_of(network, run.layers)
        height = network.shapes[region.end][ROWS]
        if run.bounds[-1] != height or run != strips_between(network, region, run.bounds):
            raise PlanError(
                f"the strips of layers {', '.join(plan.layers[index].name for index in run.layers)} are not of their "
                f"map, which has {height} rows in the end; make a new plan with 'robustdice plan'"
            )
