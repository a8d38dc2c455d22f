"""A plan whose numbers agree with each other, but not with its network, is refused before anything is made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import robustdice as rd
from nets import shared_network
from robustdice.bundle.write import write_bundles
from robustdice.errors import PlanError
from robustdice.model.fits import check_plan_fits
from robustdice.partitioning.replicate import whole
from test_strips import headed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bounds": (0, 3, 5, 30)}, "their map, which has 8 rows in the end"),
        ({"bounds": (0, 3, 5, 7)}, "their map, which has 8 rows in the end"),
        ({"bounds": (0, 2, 5, 8)}, "are not of their map"),  # others than they compute
        ({"activations": 5}, "are not of their map"),
        ({"heights": (40, 40, 40, 40)}, "are not of their map"),
    ],
)
def test_strips_of_another_map_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    network = shared_network(headed, 3, 32, 32)
    plan = rd.partition(network, devices=3, method="lop", split="rows")
    check_plan_fits(network, plan)
    other = replace(plan, strips=(replace(plan.strips[0], **changes),))
    with pytest.raises(PlanError, match=message):
        write_bundles(network, other, tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_layers_that_do_not_follow_each_other_are_no_pair(tmp_path: Path) -> None:
    network = shared_network(headed, 3, 32, 32)
    plan = rd.partition(network, devices=2, method="lop", split="hidden")
    check_plan_fits(network, plan)
    shards = (*plan.shards[:2], whole(plan.layers[2], 2), *plan.shards[3:])
    other = replace(plan, pairs={0: 2}, shards=shards)
    with pytest.raises(PlanError, match="cannot be dealt out as a pair: the one is not read by the other alone"):
        write_bundles(network, other, tmp_path / "build")
    assert not (tmp_path / "build").exists()
