"""Plans whose values travel in fewer bits: evaluator, bundles, messages and devices have the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bundles import Network as HandMade
from bundles import make_manifest, make_plan
from bundles import write_bundles as write_by_hand
from commands import fails, run, run_json
from nets import (
    Plain,
    coarsened,
    random_images,
    random_plan,
    relative_error,
    save,
    shared_graph,
    shared_network,
    with_pairs,
)
from robustdice.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from robustdice.bundle.onnx_graph import OnnxGraph
from robustdice.bundle.read import load_bundle
from robustdice.bundle.write import write_bundles
from robustdice.errors import BundleError, MessageError, PlanError
from robustdice.failure.calibrate import calibrate
from robustdice.failure.copies import Copies, intact, state_of
from robustdice.failure.passes import run_under
from robustdice.model.network import Network
from robustdice.model.pairs import possible_pairs
from robustdice.model.strips import regions, strips_of
from robustdice.plan import Holder, Layer, Plan, Shard, failure_sets
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.inprocess import InProcess
from robustdice.runtime.protocol.views import Views
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.messages import FrameId, Lineage, Parcel, Shards
from robustdice.runtime.wire.parcel_codec import IN_ONE_VIEW
from robustdice.wire_format import WIRES
from robustdice.workshop import partition
from test_bundles import NETS, made
from test_coarse_bundles import predicted
from test_strips import STEMS, with_strips

ALLOWED = {"float32": 1e-4, "float16": 5e-3, "uint8": 5e-2}
"""A number between two steps may go to the other one where what lies before it was added up in another order."""
NARROW = ("float16", "uint8")


def check_every_failure_set(
    network: Network, graph: OnnxGraph, plan: Plan, directory: Path, spares: str = "standby"
) -> None:
    images = random_images(2, network.input_shape)
    images[1] *= 20
    bundles = [load_bundle(path) for path in write_bundles(network, plan, directory / "build", spares, graph)]
    assert [exchange.wire for exchange in bundles[0].manifest.exchanges] == [
        wire for index, wire in enumerate(plan.wires) if plan.exchanged(index)
    ]
    together = InProcess(bundles)
    errors, without = [], []
    for failed in [failed for size in range(plan.devices) for failed in failure_sets(plan.devices, size)]:
        found = together.run(images, failed)
        for number, image in enumerate(images):  # scales are those of each image alone
            (one,) = predicted(network, plan, image[None], failed)
            errors.append(relative_error(found[number], one))
            (unrounded,) = predicted(network, replace(plan, wire="float32"), image[None], failed)
            without.append(relative_error(found[number], unrounded))
        assert relative_error(found, predicted(network, plan, images, failed)) < ALLOWED[plan.wire]
    assert max(errors) < ALLOWED[plan.wire]
    if set(plan.wires) != {"float32"}:  # it is rare that one lies between
        assert np.median(without) > 10 * np.median(errors)


@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("name", ["residual", "plain", "channels_last"])
def test_bundles_equal_the_evaluator_in_every_failure_set(name: str, wire: str, tmp_path: Path) -> None:
    _, network, graph = made(name)
    plan = replace(random_plan(network, 3, 3, everywhere=[1]), wire=wire)
    check_every_failure_set(network, graph, plan, tmp_path)


def test_bundles_with_coarse_copies_and_corrections_do_so_too(tmp_path: Path) -> None:
    _, network, graph = made("residual")
    plan = replace(coarsened(network, random_plan(network, 2, 3), 3), wire="uint8")
    check_every_failure_set(network, graph, plan, tmp_path, "hot")


@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_strips_travel_in_few_bits_with_a_scale_for_each_row(name: str, wire: str, tmp_path: Path) -> None:
    make, size = STEMS[name]
    network, graph = shared_network(make, 3, size, size), shared_graph(make, 3, size, size)
    run = strips_of(network, regions(network)[-1], 3)
    plan = replace(with_strips(random_plan(network, 3, 3), run), wire=wire)
    assert plan.wires[run.layers[-1]] == wire
    check_every_failure_set(network, graph, plan, tmp_path)


@pytest.mark.parametrize("spares", ["standby", "hot"])
@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("name", ["channels_last", "plain"])
def test_partial_sums_travel_in_few_bits_each(name: str, wire: str, spares: str, tmp_path: Path) -> None:
    _, network, graph = made(name)
    rounded = {a: b for a, b in possible_pairs(network).items() if not network.plan_layers[b].gives_scores}
    plan = replace(with_pairs(random_plan(network, 3, 3), rounded, 3), wire=wire)
    assert plan.pairs
    assert {plan.wires[first] for first in plan.pairs} <= set(NARROW)
    check_every_failure_set(network, graph, plan, tmp_path, spares)


def test_plans_that_differ_in_partial_sums_alone_are_told_apart_in_shared_passes() -> None:
    _, network, _ = made("channels_last")
    images = torch.from_numpy(random_images(2, network.input_shape))
    plans = [with_pairs(random_plan(network, 3, 3), possible_pairs(network), 3)]
    plans += [replace(plans[0], wire="uint8"), replace(plans[0], pairs={}, owned=frozenset(), wire="uint8")]
    sets = [failed for size in range(3) for failed in failure_sets(3, size)]
    states = [state_of(plan, failed) for failed in sets for plan in plans]
    together = run_under(network, images, states, Copies(network, {}))
    for state, found in zip(states, together, strict=True):
        (alone,) = run_under(network, images, [state], Copies(network, {}))
        torch.testing.assert_close(found, alone, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wire", WIRES)
def test_strips_sums_neurons_and_whole_layers_travel_side_by_side(wire: str, seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    make, size = STEMS["vgg"]
    network, graph = shared_network(make, 3, size, size), shared_graph(make, 3, size, size)
    run = strips_of(network, regions(network)[seed % 2], 3)
    others = [index for index in range(len(network.layers)) if index not in run.layers]
    whole = [int(random.choice(others))] if seed else []
    plan = with_strips(random_plan(network, 3, seed, everywhere=whole), run)
    possible = {a: b for a, b in possible_pairs(network).items() if {a, b} <= {*others} - {*whole}}
    plan = replace(with_pairs(plan, possible, seed), wire=wire)
    assert len({plan.split(layer) for layer in range(len(network.layers))}) >= 3
    check_every_failure_set(network, graph, plan, tmp_path, ("standby", "hot")[seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("name", NETS)
def test_bundles_of_any_network_equal_the_evaluator(name: str, wire: str, tmp_path: Path) -> None:
    _, network, graph = made(name)
    check_every_failure_set(network, graph, replace(random_plan(network, 3, 5), wire=wire), tmp_path)


def test_the_evaluator_rounds_each_image_by_its_own_range() -> None:
    _, network, _ = made("residual")
    plan = replace(random_plan(network, 3, 0), wire="uint8")
    images = random_images(3, network.input_shape)
    images[1:] *= np.array([100, 0.01], np.float32).reshape(2, 1, 1, 1)
    together = predicted(network, plan, images, frozenset({1}))
    for image, scores in zip(images, together, strict=True):
        alone = predicted(network, plan, image[None], frozenset({1}))
        assert relative_error(scores[None], alone) < ALLOWED["uint8"] / 5


def test_plans_that_differ_on_the_wire_alone_are_told_apart_in_shared_passes() -> None:
    _, network, _ = made("plain")
    images = torch.from_numpy(random_images(3, network.input_shape))
    plans = [replace(random_plan(network, 3, 0), wire=wire) for wire in WIRES]
    sets = [failed for size in range(3) for failed in failure_sets(3, size)]
    states = [intact(network), *(state_of(plan, failed) for plan in plans for failed in sets)]
    together = run_under(network, images, states, Copies(network, {}))
    for state, found in zip(states, together, strict=True):
        (alone,) = run_under(network, images, [state], Copies(network, {}))
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
    everyone_up = [together[1 + number * len(sets)] for number in range(len(WIRES))]
    torch.testing.assert_close(everyone_up[0], together[0], rtol=0, atol=0)
    assert all((scores != together[0]).any() for scores in everyone_up[1:])


def test_corrections_are_fitted_to_what_arrives() -> None:
    _, network, _ = made("residual")
    plan, images = random_plan(network, 2, 1), random_images(8, network.input_shape)
    found = {wire: calibrate(network, replace(plan, wire=wire), images) for wire in WIRES}
    codes = {wire: [each.codes.tobytes() for each in found[wire][frozenset({0})] if each] for wire in WIRES}
    assert len({b"".join(of_wire) for of_wire in codes.values()}) > 1


def test_what_travels_as_what_is_counted(tmp_path: Path) -> None:
    layers = (
        Layer("conv", 6, 1, 10, 100, 16),
        Layer("fc", 7, 1, 65, 64, 1),
        Layer("head", 2, 1, 8, 7, 1, gives_scores=True),
    )
    shards = tuple((Shard(tuple(range(of.neurons)), (Holder(0),)),) for of in layers)
    model = make_plan(2).model
    plan = Plan(2, layers, shards, 0, "test", model, wire="uint8")
    assert plan.wires == ("uint8", "float16", "float32")  # one value each is less without scales; scores are exact
    assert [plan.exchanged_bytes(layer) for layer in range(3)] == [6 * (8 + 16), 7 * 2, 2 * 4]
    whole = tuple((replace(of[0], holders=(Holder(0), Holder(1))),) for of in shards)
    assert {Plan(2, layers, whole, 0, "test", model, wire="uint8").exchanged_bytes(layer) for layer in range(3)} == {0}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").wires == plan.wires
    assert len({replace(plan, wire=wire).digest for wire in WIRES}) == 3


@pytest.mark.parametrize("wire", NARROW)
def test_sums_of_shards_travel_exactly_or_not_at_all(wire: str) -> None:
    with pytest.raises(PlanError, match=f"sums of shards cannot travel as {wire}"):
        make_plan(3, parity=True, wire=wire)
    with pytest.raises(PlanError, match="leave out --wire"):
        partition(made("plain")[1], devices=3, method="cdc", wire=wire)


def test_other_forms_are_refused() -> None:
    with pytest.raises(PlanError, match="'int7'; known: float32, float16, uint8"):
        make_plan(2, wire="int7")


@pytest.mark.parametrize(("parity", "wire"), [(False, "int7"), (True, "uint8")])
def test_a_manifest_that_says_what_cannot_be_is_refused(parity: bool, wire: str) -> None:
    document = json.loads(make_manifest(make_plan(3, parity=parity), 0).to_json())
    document["exchanges"][0]["wire"] = wire
    with pytest.raises(BundleError, match=f"{MANIFEST_NAME} contradicts itself"):
        Manifest.from_json(json.dumps(document).encode())


@pytest.mark.parametrize("wire", WIRES)
def test_messages_carry_shards_as_they_travel_and_no_other_sizes(wire: str) -> None:
    plan = make_plan(3, wire=wire)
    manifest = make_manifest(plan, 0)
    codec, form = Codec(plan.digest, manifest), manifest.exchanges[0].form(1)
    values = np.random.default_rng(0).standard_normal((1, *form.shape)).astype(np.float32)
    message = Shards(1, 1, FrameId("ab", 1), 0, Parcel(((0, 1),), (form.narrow(values),)))
    (whole,) = (bytes(part) for part in codec.encode(message))
    told, array = whole[: -form.nbytes], whole[-form.nbytes :]
    (found,) = codec.decode([told, array], 1).parcel.arrays  # type: ignore[union-attr]
    np.testing.assert_array_equal(form.widen(found), form.widen(form.narrow(values)))
    for wrong in (array[:-1], array + b"x", b"", values.tobytes() + b"x"):
        with pytest.raises(MessageError, match="bytes follow"):
            codec.decode([told, wrong], 1)


@pytest.mark.parametrize("wire", WIRES)
def test_every_owner_is_sent_its_own_slices_of_a_sum(wire: str) -> None:
    plan = make_plan(3, pair=True, owned=True, wire=wire)
    manifests = [make_manifest(plan, device) for device in range(3)]
    view, lineage = Views(manifests[0]).of((0, 1, 2)), Lineage((0, 1, 2))
    exchange, sent = manifests[0].exchanges[0], {}
    for shards, receivers in zip(view.parcels[0], view.receivers[0], strict=True):
        sent.update(dict.fromkeys(receivers, shards))
    assert view.due[0][0] == view.parcels[0][0]
    numbers = [number % len(exchange.slices) for shards in (*sent.values(), view.due[0][0]) for _, number in shards]
    assert sorted(numbers) == [*range(len(exchange.slices))]
    for to, shards in sent.items():
        forms = [exchange.form(number) for _, number in shards]
        values = [np.full((1, *form.shape), n, np.float32) for n, form in enumerate(forms)]
        arrays = [form.narrow(value) for form, value in zip(forms, values, strict=True)]
        parts = Codec(plan.digest, manifests[0]).encode(
            Shards(0, 1, FrameId("ab", 1), 0, Parcel(shards, arrays), lineage)
        )
        found = Codec(plan.digest, manifests[to]).decode(parts, 0)
        assert isinstance(found, Shards)
        assert found.parcel.shards == shards == Views(manifests[to]).of((0, 1, 2)).due[0][0]
        for form, value, array in zip(forms, values, found.parcel.arrays, strict=True):
            np.testing.assert_allclose(form.widen(array), value, rtol=1e-6)
        head = bytearray(parts[0])
        head[3] = IN_ONE_VIEW  # without the list that follows
        with pytest.raises(MessageError, match="publishes nothing in stage 0"):
            Codec(plan.digest, manifests[to]).decode([bytes(head), *parts[1:]], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda exchanges: exchanges[0].update(owners=None),
        lambda exchanges: exchanges[0].update(owners=2),
        lambda exchanges: exchanges[0].update(owners=7),
        lambda exchanges: exchanges[0]["slices"].pop(),
        lambda exchanges: exchanges[0]["slices"][0].append(11),
        lambda exchanges: exchanges[1]["shards"][0]["holders"].pop(),
        lambda exchanges: exchanges[1].update(slices=[[0]]),
    ],
)
def test_a_manifest_with_impossible_owners_is_refused(change: Callable[[Any], object]) -> None:
    manifest = make_manifest(make_plan(3, pair=True, owned=True), 0)
    manifest = replace(manifest, files={part.file: FileEntry(1, "0" * 64) for part in manifest.parts})
    assert Manifest.from_json(manifest.to_json()) == manifest
    document = json.loads(manifest.to_json())
    change(document["exchanges"])
    with pytest.raises(BundleError, match=r"contradicts itself: (the owners of sums|a shard)"):
        Manifest.from_json(json.dumps(document).encode())


def test_device_processes_answer_with_what_was_predicted(tmp_path: Path) -> None:
    plan = make_plan(2, holders=1, interleaved=True, wire="uint8")
    reference = InProcess(write_by_hand(tmp_path, plan, HandMade()))
    write_cluster(tmp_path, 2, plan.digest)
    frames = random_images(20, (1, 8, 8))
    expected = np.concatenate([reference.run(frame[None]) for frame in frames])
    exact = HandMade().run(frames)
    with LocalCluster(tmp_path, timeout_seconds=5.0) as cluster:
        found = [answer.outputs for answer in cluster.client.stream(frames)]
    np.testing.assert_array_equal(found, expected)
    assert 1e-4 < relative_error(expected, exact) < 0.05


def test_the_command_says_what_travels_and_what_cannot(tmp_path: Path) -> None:
    save(Plain(), tmp_path / "net.pt2", 1, 8, 8)
    arguments = ("plan", tmp_path / "net.pt2", "--devices", "3", "--method", "lop", "-o", tmp_path / "plan.json")
    narrow = run_json(*arguments, "--wire", "uint8")
    assert (narrow["wire"], Plan.load(narrow["output"]).wire) == ("uint8", "uint8")
    assert narrow["exchanged_bytes"] == 6 * (16 + 8) + 2 * 7 + 4 * 4
    text = " ".join(run(*arguments, "--wire", "uint8").stdout.split())
    assert "0.2 kB (0.1 as uint8, 0.0 as float16, 0.0 as float32)" in text
    assert "known: float32, float16, uint8" in fails(*arguments, "--wire", "int8")
    assert "sums of shards cannot travel" in fails(*arguments[:4], "--method", "cdc", *arguments[6:], "--wire", "uint8")
