"""What is hostile gets an error of ours, or is refused: at every parser, and from a client whose key is listed."""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import INPUT_SHAPE, Network, make_manifest, make_plan, write_bundles
from fuzzing import case, parsers, problem
from robustdice.bundle.manifest import Manifest
from robustdice.cost.profile import TYPICAL, Profile
from robustdice.errors import BundleError, PlanError
from robustdice.importance.values import LIMIT_BYTES, Importance
from robustdice.runtime.client import Client
from robustdice.runtime.cluster import LocalCluster
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.founding import write_cluster
from robustdice.runtime.wire.keys import read_secret
from robustdice.runtime.wire.line import set_options
from robustdice.runtime.wire.messages import DOCUMENT_LIMIT, Frame, FrameId

FRAME = np.random.default_rng(7).standard_normal(INPUT_SHAPE).astype(np.float32)
MODELS = {"models"}
"""Read by native code, which may end a process: ``python tests/fuzzing.py`` tries them in children of its own."""
NAMES = (
    *("messages", "parcels", "manifests", "plans", "clusters", "scores"),
    *("sidecars", "profiles", "keys", "bundles", "images"),
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


def test_all_parsers_are_here(room: Path) -> None:
    assert {*parsers(room)} == {*NAMES} | MODELS


@pytest.mark.parametrize("name", NAMES)
def test_whatever_comes_in_a_parser_gives_something_or_says_what_is_wrong(name: str, room: Path) -> None:
    parser = parsers(room)[name]

    @settings(max_examples=20 if name == "bundles" else 200)
    @given(st.integers(0, 10**9))
    def check(number: int) -> None:
        assert problem(parser, case(parser, name, 1, number)) is None

    check()


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
    write_cluster(directory, 2, plan.digest)
    with LocalCluster(directory, timeout_seconds=5.0) as running:
        yield running


@pytest.fixture
def listed(cluster: LocalCluster) -> Iterator[zmq.Socket[bytes]]:
    """A connection to device 0 by somebody whose key is listed, and who says whatever he likes and reads nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    keys, entry = read_secret(cluster.directory / "client.key"), cluster.cluster.devices[0]
    set_options(socket, "curve", keys, entry.public_key.encode(), 2**30)
    socket.sndtimeo = 200
    socket.connect(entry.address)
    yield socket
    socket.close(0)
    context.term()


def resident(client: Client) -> int:
    return int(client.status()[0]["rss_bytes"])


def test_a_frame_beyond_the_largest_of_the_plan_ends_the_connection_before_it_is_read(
    cluster: LocalCluster, listed: zmq.Socket[bytes]
) -> None:
    before = resident(cluster.client)
    monitor = listed.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    listed.send(bytes(64 * DOCUMENT_LIMIT), copy=False)
    assert monitor.poll(5000)
    monitor.close(0)
    listed.disable_monitor()
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
