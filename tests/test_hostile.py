"""What is hostile gets an error of ours, or is refused: at every parser, and from a client whose key is listed."""

from __future__ import annotations

import contextlib
import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fuzzing
from bundles import INPUT_SHAPE, Network, make_manifest, make_plan, write_bundles
from fuzzing import case, fuzz, problem
from hostile_parsers import PARSERS, Parser, parser_of
from robustdice.bundle.manifest import MANIFEST_NAME, Manifest
from robustdice.bundle.read import load_bundle
from robustdice.cost.profile import TYPICAL, Profile
from robustdice.errors import BundleError, PlanError
from robustdice.importance.values import LIMIT_BYTES, Importance
from robustdice.plan.file import corrections_from
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.executor import Executor
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import CLUSTER_NAME, ClientEntry
from robustdice.runtime.wire.connections import HELD_BYTES, MOST_OF_A_KEY, MOST_SILENT
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.keys import new_pair, read_secret, write_secret
from robustdice.runtime.wire.line import Reach, set_options
from robustdice.runtime.wire.messages import DOCUMENT_LIMIT, Answer, Frame, FrameId, Refused, StatusRequest
from test_networks import until

OTHER_KEY_NAME = "other.key"
FRAME = np.random.default_rng(7).standard_normal(INPUT_SHAPE).astype(np.float32)
IN_CHILDREN = {"models", "weights"}
"""Native code may end the process, or PyTorch is needed: ``python tests/fuzzing.py`` tries them."""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in IN_CHILDREN])
def test_whatever_comes_in_a_parser_gives_something_or_says_what_is_wrong(name: str, room: Path) -> None:
    parser = parser_of(name, room)

    @settings(max_examples=20 if name == "bundles" else 200)
    @given(st.integers(0, 10**9))
    def check(number: int) -> None:
        assert problem(parser, case(parser, name, 1, number)) is None

    check()


@pytest.mark.parametrize(("name", "number"), [("plans", 15196), ("plans", 902841)])
def test_what_a_million_cases_found_does_not_come_back(name: str, number: int, room: Path) -> None:
    """Corrections of a layer that the plan does not have."""
    parser = parser_of(name, room)
    assert problem(parser, case(parser, name, 1, number)) is None


@pytest.mark.parametrize("layer", [-1, 2, 10**9])
def test_corrections_of_a_layer_that_the_plan_does_not_have_are_an_error(layer: int) -> None:
    body = {"layers": [{}] * 2, "corrections": [{"failed": [0], "layers": [layer]}]}
    arrays: dict[str, NDArray[Any]] = {
        f"corrections/0/{layer}/codes": np.zeros((2, 3), np.int8),
        f"corrections/0/{layer}/steps": np.ones(2, np.float16),
    }
    with pytest.raises(ValueError, match="the plan has 2"):
        corrections_from(body, arrays)


@pytest.mark.parametrize("stands_still", [lambda _: [None for _ in iter(int, 1)], lambda _: time.sleep(99)])
def test_a_parser_that_does_not_end_is_found(
    stands_still: Callable[[object], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARSERS, "stands still", lambda _: Parser([b""], lambda _, given: given, stands_still))
    monkeypatch.setattr(fuzzing, "CASE_SECONDS", 0.05)
    monkeypatch.setattr(fuzzing, "WAIT_SECONDS", 0.3)
    (found,) = fuzz("stands still", range(1), seed=0)
    assert "Hang" in found


def test_texts_with_halves_of_characters_and_values_of_any_size_are_refused(room: Path) -> None:
    manifest = make_manifest(make_plan(3), 0).to_json().decode()
    name, shape = json.loads(manifest)["input"], json.loads(manifest)["input_shape"]
    for before, after in ((f'"{name}"', '"\\ud800"'), (json.dumps(shape, indent=2), json.dumps([2**20, 2**20]))):
        hostile = re.sub(r"\s+", " ", manifest).replace(re.sub(r"\s+", " ", before), after)
        with pytest.raises(BundleError, match=r"not JSON|the size of a value"):
            Manifest.from_json(hostile.encode())
    TYPICAL.save(room / "profile.json")
    text = (room / "profile.json").read_text()
    (room / "profile.json").write_text(text.replace("{", '{"\\udfff": 1,', 1))
    with pytest.raises(PlanError, match="not JSON"):
        Profile.load(room / "profile.json")


@pytest.mark.parametrize("value", ["1e999", "[" * 30_000, "[99]"])
def test_numbers_and_depths_that_python_cannot_are_damage(value: str, room: Path) -> None:
    manifest = json.loads(make_manifest(make_plan(3), 0).to_json())
    manifest["stages"][0]["exchanges"] = "HERE"
    with pytest.raises(BundleError, match=r"damaged|not JSON|contradicts"):
        Manifest.from_json(json.dumps(manifest).replace('"HERE"', value).encode())
    profile = room / "profile.json"
    TYPICAL.save(profile)
    text = json.dumps({**json.loads(profile.read_text()), "hop_seconds": "HERE"})
    for hostile in (value, "9" * 400):
        profile.write_text(text.replace('"HERE"', hostile))
        with pytest.raises(PlanError, match=r"damaged|not JSON"):
            Profile.load(profile)


def test_a_bundle_whose_manifest_and_models_contradict_each_other_is_refused_at_the_start(room: Path) -> None:
    directory = write_bundles(room, make_plan(2), Network())[0].directory
    text = (directory / MANIFEST_NAME).read_text()
    (directory / MANIFEST_NAME).write_text(text.replace('"y0"', '"another"'))
    with pytest.raises(BundleError, match=r"stage0-piece0.onnx cannot be computed: .*another"):
        Executor(load_bundle(directory)).try_out()


def test_scores_that_unpack_to_a_terabyte_or_have_no_header_are_refused(room: Path) -> None:
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (%s), }"
    for content in (bytes(LIMIT_BYTES + 1), header % b"100000000000,", header % b"1,(", b""):
        with zipfile.ZipFile(room / "scores.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.npy", content.ljust(128) if content[:1] == b"\x93" else content)
        with pytest.raises(PlanError, match="not a file of scores"):
            Importance.load(room / "scores.npz")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("cluster")
    plan = make_plan(2)
    write_bundles(directory, plan, Network())
    founded = write_cluster(directory, 2, plan.digest)
    public, secret = new_pair()
    write_secret(directory / OTHER_KEY_NAME, secret)
    listed = (*founded.clients, ClientEntry("other", public.decode()))
    replace(founded, clients=listed).write(directory / CLUSTER_NAME)
    with LocalCluster(directory, timeout_seconds=5.0) as running:
        yield running


Dial = Callable[..., "zmq.Socket[bytes]"]


@pytest.fixture
def dial(cluster: LocalCluster) -> Iterator[Dial]:
    """Connections to a device by somebody whose key is listed, and who says whatever he likes and reads nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys, kept = read_secret(cluster.directory / OTHER_KEY_NAME), list[zmq.Socket[bytes]]()

    def connect(device: int = 0, kind: int = zmq.DEALER, times: int = 1) -> zmq.Socket[bytes]:
        socket, entry = context.socket(kind), cluster.cluster.devices[device]
        set_options(socket, "curve", keys, entry.public_key.encode(), 2**30)
        socket.sndtimeo, socket.reconnect_ivl = 200, -1
        for _ in range(times):
            socket.connect(entry.address)
        kept.append(socket)
        return socket

    yield connect
    context.destroy(0)


@pytest.fixture
def listed(dial: Dial) -> zmq.Socket[bytes]:
    return dial()


def resident(client: Client, what: str = "rss_bytes") -> int:
    return int(client.status(5.0)[0][what])


def forget_peak(client: Client) -> None:
    """What was resident before does not count any more: other tests have used the same device."""
    Path(f"/proc/{client.status(5.0)[0]['process']}/clear_refs").write_text("5", encoding="ascii")


def test_a_frame_beyond_the_largest_of_the_plan_ends_the_connection_before_it_is_read(
    cluster: LocalCluster, listed: zmq.Socket[bytes]
) -> None:
    before = resident(cluster.client)
    monitor = listed.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    listed.send(bytes(64 * DOCUMENT_LIMIT), copy=False)
    assert monitor.poll(5000)
    monitor.close(0)
    assert resident(cluster.client) < before + 8 * DOCUMENT_LIMIT
    assert cluster.client.infer(FRAME).coverage == 1.0


def test_who_floods_a_device_and_reads_nothing_takes_no_more_than_his_queue(
    cluster: LocalCluster, listed: zmq.Socket[bytes]
) -> None:
    codec = Codec(cluster.cluster.plan_digest)
    cluster.infer(FRAME)
    before, sent, start = resident(cluster.client), 0, time.monotonic()
    junk = bytes(DOCUMENT_LIMIT)
    while time.monotonic() < start + 1.0:
        frame = codec.encode(Frame(FrameId("ab", sent), 0, 60.0, FRAME[None]))
        for parts in (frame, [junk]):
            with contextlib.suppress(zmq.Again):
                listed.send_multipart(parts)
        sent += 1
    assert sent > 20
    answers = list(cluster.client.stream([FRAME] * 20))
    assert all(answer.coverage == 1.0 for answer in answers)
    assert resident(cluster.client) < before + 64e6


def refused(cluster: LocalCluster) -> str:
    return " ".join(entry["count"] * (entry["reason"] + "; ") for entry in cluster.client.status(5.0)[0]["refused"])


def test_a_message_of_too_many_bytes_or_parts_ends_the_connection(cluster: LocalCluster, dial: Dial) -> None:
    cluster.infer(FRAME)
    megabyte = bytes(2**20)
    forget_peak(cluster.client)
    before = resident(cluster.client)
    for parts in ([megabyte] * 100, [b""] * 100_000, [b"x"] * 100):
        socket = dial()
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_multipart(parts, copy=False)
        assert monitor.poll(5000), "the connection stands"
        assert cluster.infer(FRAME).coverage == 1.0
    assert "parts" in refused(cluster)
    assert "wait to be read" in refused(cluster)
    most = HELD_BYTES + 25e6  # what is bounded, and what comes until somebody looks
    assert resident(cluster.client, "peak_rss_bytes") < before + most


def test_a_key_has_so_many_connections_and_no_more(cluster: LocalCluster, dial: Dial) -> None:
    cluster.infer(FRAME)
    files = Path("/proc") / str(cluster.client.status(5.0)[0]["process"]) / "fd"
    before = len(list(files.iterdir()))
    dial(0, zmq.ROUTER, 500)
    until(lambda: refused(cluster).count("nothing was said") >= 500 - MOST_SILENT)
    asking = cluster.client._codec.encode(StatusRequest("ab"))
    for _ in range(MOST_OF_A_KEY + 10):
        dial().send_multipart(asking)
    until(lambda: f"{MOST_OF_A_KEY} connections already" in refused(cluster))
    assert cluster.infer(FRAME).coverage == 1.0
    until(lambda: len(list(files.iterdir())) <= before + MOST_OF_A_KEY + MOST_SILENT + 4)
    with Client(cluster.directory / CLUSTER_NAME, cluster.directory / OTHER_KEY_NAME) as late:
        until(lambda: late.status(0.2) is not None and late.troubles().get(0) == Reach.FULL.value)
        assert late.infer(FRAME).device == 1, "the other device has room"


def test_a_greedy_client_and_a_modest_one_are_both_answered(cluster: LocalCluster, dial: Dial) -> None:
    codec, sockets = Codec(cluster.cluster.plan_digest), [dial(0), dial(1)]
    said = []
    for number in range(10):
        for frame in range(50 * number, 50 * number + 50):
            for socket in sockets:  # under ever new names, and nothing is ever over for it
                with contextlib.suppress(zmq.Again):
                    socket.send_multipart(codec.encode(Frame(FrameId(f"{frame:x}", 0), 0, 60.0, FRAME[None])))
        assert cluster.infer(FRAME).coverage == 1.0
        with contextlib.suppress(zmq.Again):
            while True:
                said.append(type(codec.decode(sockets[0].recv_multipart(zmq.NOBLOCK), 0)))
    assert said.count(Answer) > 10
    assert {*said} <= {Answer, Refused}


def test_a_client_cannot_speak_by_anothers_name_nor_push_it_out(cluster: LocalCluster, dial: Dial) -> None:
    client, socket = cluster.client, dial()
    assert client.status()
    socket.send_multipart(client._codec.encode(StatusRequest(client._name)))
    for number in range(200):
        name = f"abc{number:x}"  # of no other test: late answers go to who has the name now
        socket.send_multipart(client._codec.encode(StatusRequest(name)))
        assert socket.poll(2000)
        socket.recv_multipart()
    assert cluster.infer(FRAME).coverage == 1.0
    assert not socket.poll(300), "one reply to each name but another's"
