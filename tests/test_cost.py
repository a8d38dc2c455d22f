"""The cost model: what follows from a profile and a link, what is chosen by it, and what a profile's file refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from commands import fails, run
from nets import Residual, network_of, save, seeded, shared_network
from robustdice.cost.model import Judge, alone, handed_over, parse_link, predict, shares
from robustdice.cost.profile import TYPICAL, LayerSeconds, Profile
from robustdice.entropy_code import CODED, over
from robustdice.errors import PlanError
from robustdice.meter.arithmetic import measure_layers
from robustdice.meter.handing import measure_handing
from robustdice.meter.unpacking import FILTER_WEIGHTS, _codes, _filters, measure_unpacking
from robustdice.partitioning import Answer, Request
from robustdice.partitioning.replicate import whole
from robustdice.representation import REPRESENTATIONS, code_offset
from robustdice.splits import choose_splits, even_plan, plans_for_fewer, splits_of
from robustdice.workshop import partition
from test_pairs import Equal
from test_plan import example
from test_strips import headed, striped, vgg

ROUND = Profile(
    exchange_seconds=1.0,
    peer_seconds=0.5,
    value_seconds={"float32": 0.01, "float16": 0.02, "uint8": 0.03},
    hop_seconds=0.5,
    frame_seconds=3.0,
    layers={
        "conv": LayerSeconds(whole=10.0, part=6.0, share=0.5),
        "dw": LayerSeconds(whole=8.0, part=4.0, share=0.5),
        "fc": LayerSeconds(whole=2.0, part=2.0, share=1.0),
    },
    rest_seconds=2.0,
)
"""Of numbers that are easily added up."""


def test_part_of_a_layer_takes_what_was_measured_and_straight_lines_between() -> None:
    measured = LayerSeconds(whole=10.0, part=6.0, share=0.5)
    assert [measured.of(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 3, 6, 8, 10]


def test_processors_bound_the_rate_and_the_slowest_of_each_stage_the_latency() -> None:
    plan = striped()  # conv and dw in strips of 60/40/60 and 40/20/40 % of their rows, fc on the devices 0 and 2
    assert shares(plan, 1).tolist() == [0.4, 0.2, 0.4]
    assert handed_over(plan, 1).tolist() == [32 * 2 / 5, 32 / 5, 32 * 2 / 5]
    assert handed_over(plan, 2).tolist() == [1, 0, 1]
    found = predict(plan, ROUND)
    first = (6 + 0.6 / 0.5 * 0 + (0.6 - 0.5) * 2 * 4) + 0.4 * 8  # conv, dw on device 0
    strips = 1.0 + 2 * 0.5 + (2 * 12.8 + 6.4 + 12.8) * 0.01
    scores = 1.0 + 2 * 0.5 + (2 * 1 + 1) * 0.01
    assert found.processor_seconds == pytest.approx(3 + 2 + first + strips + 1 + scores)
    assert found.frames_per_second == pytest.approx(1 / found.processor_seconds)
    assert found.latency_seconds == pytest.approx(found.processor_seconds + 2 * 0.5)
    assert found.sent_bytes == pytest.approx(4 * (2 * 12.8 + 2 * 1))


def test_a_slow_link_bounds_the_rate_instead() -> None:
    plan, free = striped(), predict(striped(), ROUND)
    slow = predict(plan, ROUND, 8.0)  # a byte a second
    assert slow.frames_per_second == pytest.approx(1 / (4 * (2 * 12.8 + 2 * 1)))
    assert slow.latency_seconds == pytest.approx(free.latency_seconds + 4 * (2 * 12.8 + 2 * 1))
    by_neurons = replace(plan, strips=(), shards=example().shards)
    halves = predict(replace(by_neurons, wire="float16"), ROUND, 8.0)
    assert halves.frames_per_second == pytest.approx(2 * predict(by_neurons, ROUND, 8.0).frames_per_second, rel=0.05)


def test_without_exchanges_devices_take_frames_in_turn() -> None:
    network = shared_network(Residual, 3, 8, 8)
    plan = partition(network, devices=3, method="full")
    found = predict(plan, TYPICAL)
    assert found == alone(TYPICAL, plan.layers, 3)
    assert found.frames_per_second == pytest.approx(3 / found.latency_seconds)
    assert plans_for_fewer(network, plan, Judge()) == [plan]


def test_coarse_copies_take_as_long_as_their_representation_does() -> None:
    network = shared_network(headed, 3, 32, 32)
    taken = {
        kind: predict(partition(network, devices=2, method="full", precision=kind), TYPICAL).latency_seconds
        for kind in ("float32", "int8", "int3")
    }
    assert taken["float32"] == alone(TYPICAL, network.plan_layers).latency_seconds
    assert taken["float32"] < taken["int8"] < taken["int3"]
    layer = next(each for each in network.plan_layers if each.neuron_macs == each.filter_weights)
    exact = ROUND.seconds(layer, 0.5)
    assert ROUND.seconds(layer, 0.5, "int4") == exact  # packed linear layers are multiplied as they are
    weights = 0.5 * layer.neurons * layer.filter_weights
    assert ROUND.seconds(layer, 0.5, "int2") == pytest.approx(1.5 * exact + weights * ROUND.unpack_seconds["int2"])


def test_spares_cost_nothing_while_they_stand_by() -> None:
    network = shared_network(headed, 3, 32, 32)
    fine, mixed = (
        partition(network, devices=2, method="lop", precision="float32", spare_precision=kind)
        for kind in ("float32", "int8")
    )
    assert predict(mixed, TYPICAL) == predict(fine, TYPICAL)


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gbit", 1e9), ("100 Mbit/s", 1e8), ("64kbps", None), ("2.5gbit", 2.5e9), ("8bit", 8.0)]
)
def test_links_are_said_in_bits_per_second(text: str, rate: float | None) -> None:
    if rate is None:
        with pytest.raises(PlanError, match="link '64kbps' is not a rate"):
            parse_link(text)
    else:
        assert parse_link(text) == rate


@pytest.mark.parametrize("text", ["", "0Gbit", "fast", "1GB", "-1Mbit", "1e400Gbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a rate; give bits per second such as '1Gbit'"):
        parse_link(text)


# -- choosing by it


def device(exchange_seconds: float, macs_per_second: float) -> Profile:
    values = dict.fromkeys(("float32", "float16", "uint8"), 1e-12)
    return replace(
        TYPICAL,
        exchange_seconds=exchange_seconds,
        peer_seconds=0.0,
        value_seconds=values,
        macs_per_second=macs_per_second,
    )


def splits(profile: Profile, devices: int = 2, link: float | None = None, goal: str = "throughput") -> list[str]:
    network = shared_network(headed, 3, 32, 32)
    chosen = choose_splits(network, devices, Judge(profile, link, goal), "float32", pairs_too=True)
    plan = even_plan(network, devices, chosen, "float32")
    return [plan.split(layer) for layer in range(6)]


def test_splits_follow_from_what_handing_over_costs() -> None:
    dear, cheap = device(1.0, 1e9), device(0.0, 1e6)
    assert splits(dear)[:4] == ["whole"] * 4  # no exchange but those that the heavy layers need
    assert splits(dear)[4:] in (["hidden", "hidden"], ["neurons", "neurons"], ["neurons", "whole"])
    assert splits(cheap)[:4] != ["whole"] * 4  # then arithmetic is all that counts: neurons have no halo
    middle = device(2e-5, 1e9)
    assert splits(middle)[:3] == ["rows"] * 3


@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize("link", [None, 1e6])
def test_chosen_splits_are_modelled_to_be_no_worse_than_any_one_word(goal: str, link: float | None) -> None:
    network = shared_network(headed, 3, 32, 32)
    for profile in (TYPICAL, device(1e-3, 1e8), device(1e-5, 1e9)):
        judge = Judge(profile, link, goal)
        best = judge.seconds(even_plan(network, 3, splits_of(network, 3, "auto", judge), "float32"))
        for word in ("neurons", "hidden", "rows"):
            by_word = judge.seconds(even_plan(network, 3, splits_of(network, 3, word, judge), "float32"))
            assert best <= by_word * (1 + 1e-9)


def test_a_run_ends_before_what_strips_have_in_common_outweighs_the_exchanges() -> None:
    network = shared_network(headed, 3, 32, 32)
    lengths = [
        len(plan.strips[0].layers)
        for profile in (device(0.0, 1e6), device(1.0, 1e9))
        for plan in [partition(network, devices=4, method="lop", split="rows", profile=profile)]
    ]
    assert lengths == [1, 4]


def test_a_plan_by_the_cost_model_keeps_its_method_and_says_how_it_was_made() -> None:
    network = shared_network(headed, 3, 32, 32)
    plan = partition(network, devices=2, method="lop", split="auto", profile=device(2e-5, 1e9), link="1Gbit")
    assert plan.settings["split"] == "auto"
    assert plan.method == "lop"
    assert plan.strips
    sums = partition(network, devices=3, method="cdc", split="auto", profile=device(1e-5, 1e9))
    assert not sums.pairs
    coarse = partition(network, devices=2, method="lop", precision="int8", split="auto", profile=device(1e-5, 1e9))
    assert all(map(coarse.is_coarse_pair, coarse.pairs))
    with pytest.raises(PlanError, match="unknown goal 'speed'; known: throughput, latency"):
        partition(network, devices=2, method="lop", split="auto", goal="speed")
    fewer = plans_for_fewer(network, partition(network, devices=4, method="lop"), Judge())
    assert [each.devices for each in fewer] == [2, 3, 4]


def everywhere(request: Request) -> Answer:
    return Answer(tuple(whole(layer, request.devices) for layer in request.layers), {})


def test_a_split_or_a_goal_that_would_change_nothing_is_refused() -> None:
    network = shared_network(headed, 3, 32, 32)
    for split in ("neurons", "hidden"):
        with pytest.raises(PlanError, match=f"nothing is chosen for latency where layers are split by {split}"):
            partition(network, devices=2, method="lop", split=split, goal="latency")
    for split in ("hidden", "auto"):
        with pytest.raises(PlanError, match=f"every layer on every device: there is nothing to split {split}"):
            partition(network, devices=2, method="full", split=split)
    with pytest.raises(PlanError, match="every device holds the layers that pairs begin with"):
        partition(network, devices=2, method=everywhere, split="hidden")
    unpaired = shared_network(Equal, 6, 4, 4)
    with pytest.raises(PlanError, match="no two layers of the model hand over less as a pair on 16 devices"):
        partition(unpaired, devices=16, method="lop", split="hidden")
    fast = partition(network, devices=2, method="lop", split="rows", goal="latency")
    assert fast.strips


# -- measuring


def test_layers_are_measured_and_larger_ones_take_longer() -> None:
    network = network_of(
        seeded(lambda: nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 2, 1), nn.Flatten())), 8, 40, 40
    )
    times, rest = measure_layers(network)
    large, small = times.values()
    assert large.whole > small.whole > 0
    assert large.whole > large.part > 0
    assert (large.share, small.share) == (0.5, 0.5)
    assert 0 <= rest < large.whole


def test_unpacking_is_measured_of_every_representation() -> None:
    found = measure_unpacking()
    assert list(found) == [kind for kind in REPRESENTATIONS if kind != "float32"]
    assert all(1e-12 < seconds < 1e-6 for seconds in found.values())


@pytest.mark.parametrize("kind", [kind for kind in REPRESENTATIONS if kind != "float32"])
def test_what_is_unpacked_then_is_what_a_bundle_would_have(kind: str) -> None:
    weights, part = _filters(kind)
    (levels,) = weights.filters(part).values()
    np.testing.assert_array_equal(levels, _codes(kind) + np.float32(code_offset(kind)))
    if kind in CODED:  # nearly all of the room is taken
        assert -0.1 * CODED[kind].room(FILTER_WEIGHTS) < over(_codes(kind), kind).mean() <= 0


@pytest.mark.slow
def test_handing_over_is_measured_between_real_processes() -> None:
    profile = measure_handing()
    assert 1e-5 < profile.exchange_seconds < 0.1
    assert 1e-5 < profile.frame_seconds < 0.1
    assert 0 < profile.value_seconds["float32"] < 1e-6


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = replace(ROUND, model_digest="ab" * 32)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_a_profile_from_before_there_were_entropy_codes_takes_what_is_typical(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    ROUND.save(path)
    document = json.loads(path.read_text())
    for kind in CODED:
        del document["unpack_seconds"][kind]
    path.write_text(json.dumps(document))
    assert Profile.load(path) == ROUND


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a profile .it is not JSON"),
        ("[1]", "no robustdice-profile header"),
        ({"format": "robustdice-plan"}, "no robustdice-profile header"),
        ({"version": 1}, "has profile version 1, this version reads 2"),
        ({"exchange_seconds": -1}, "is a damaged profile .*-1 where a number of at least 0 belongs"),
        ({"hop_seconds": "soon"}, "is a damaged profile"),
        ({"value_seconds": 3}, "is a damaged profile"),
        ({"unpack_seconds": 3}, "is a damaged profile"),
        ({"layers": {"conv": {"whole": 1}}}, "is a damaged profile"),
    ],
)
def test_what_is_no_profile_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    ROUND.save(path)
    text = content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Profile.load(path)
    with pytest.raises(PlanError, match="cannot read the profile"):
        Profile.load(tmp_path / "missing.json")


def test_a_profile_of_another_model_is_refused() -> None:
    other = replace(ROUND, model_digest="cd" * 32)
    with pytest.raises(
        PlanError, match=r"the profile is of a model with digest cdcdcdcdcdcd, net.pt2 has abababababab"
    ):
        predict(example(), other)


def test_plan_prints_modelled_figures_for_every_number_of_devices(tmp_path: Path) -> None:
    model, profile = save(seeded(vgg), tmp_path / "net.pt2", 3, 32, 32), tmp_path / "profile.json"
    device(1e-3, 1e9).save(profile)
    plan = ("plan", model, "--devices", "3", "--method", "lop", "-o", tmp_path / "plan.json", "--link", "1Gbit")
    text = " ".join(run(*plan, "--profile", profile).stdout.split())
    assert "modelled from" in text
    assert "splitting does not pay" in text
    said = json.loads(run(*plan, "--split", "auto", "--for", "latency", "--json").stdout)["modelled"]
    assert [each["devices"] for each in said["plans"]] == [2, 3] == [each["devices"] for each in said["replicas"]]
    assert said["link_bits_per_second"] == 1e9
    assert said["splitting_pays"] == {"throughput": False, "latency": False}
    assert np.all([each["frames_per_second"] > 0 for each in said["plans"]])
    assert "link '1GB' is not a rate" in fails(*plan[:-1], "1GB")
