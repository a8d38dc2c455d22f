"""What an exchange costs in CPU time between two processes: encrypted by ZeroMQ (CURVE), by a library, or not at all.

Each exchange, both processes send a header of 32 bytes and an array, and have what they receive in a buffer of their
own. CPU time is that of a whole process, all its threads. AES-GCM and ChaCha20-Poly1305 are measured where the
``cryptography`` package (47 or later) is installed. Then what the forms of :mod:`robustdice.wire_format` take.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq
from paired import record

from robustdice.runtime.wire.line import set_options
from robustdice.wire_format import WIRES, WireForm

ROUNDS = 5
SECONDS = 0.25
SIZES = {
    "4 KB": (4096, 1),
    "16 KB": (16384, 1),
    "64 KB": (65536, 1),
    "1 MB": (2**20, 1),
    "36 MB in 12": (3 * 2**20, 12),
}
"""Bytes of an array, and how many such exchanges count as one."""

Seal = Callable[[int, Any], Any]
"""From the number of an exchange and an array to what is sent."""
Open = Callable[[int, Any, Any], object]
"""From the number, what has come, and the buffer that it is to be in."""


def copied(_: int, sent: Any, into: Any) -> None:
    """What has come, as it is."""
    into[:] = sent


def sealed(name: str) -> tuple[Seal, Open]:
    """Arrays encrypted and authenticated in Python: every one with a nonce of its own, without a copy of its own."""
    aead = importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")  # it need not be installed
    cipher = {"AES-128-GCM": aead.AESGCM, "ChaCha20": aead.ChaCha20Poly1305}[name]
    box = cipher(bytes(16 if name.startswith("AES") else 32))
    rooms: dict[tuple[int, int], bytearray] = {}

    def seal(number: int, array: Any) -> Any:
        key = (len(array), number % 2)  # what went before may still be on its way
        if (room := rooms.get(key)) is None:
            room = rooms[key] = bytearray(len(array) + 16)
        box.encrypt_into(struct.pack("<IQ", 0, number), array, None, room)
        return room

    def unseal(number: int, sent: Any, into: Any) -> None:
        box.decrypt_into(struct.pack("<IQ", 0, number), sent, None, into)

    return seal, unseal


def kinds() -> dict[str, tuple[str, str]]:
    """The ways to be measured: ZeroMQ's transport, and what arrays are encrypted with before, if anything."""
    found = {"plain": ("plain", ""), "curve": ("curve", "")}
    try:
        sealed("ChaCha20")[0](0, bytes(1))
    except (ImportError, AttributeError):
        print("cryptography 47 or later is not installed: no AES-GCM, no ChaCha20")
        return found
    return found | {name: ("plain", name) for name in ("AES-128-GCM", "ChaCha20")}


def exchange(socket: zmq.Socket[bytes], cipher: str, size: int, count: int) -> float:
    """Seconds of CPU that ``count`` exchanges of ``size`` bytes take this process."""
    seal, unseal = sealed(cipher) if cipher else (lambda _, array: array, copied)
    header, raw, into = bytes(32), memoryview(bytes(size)), memoryview(bytearray(size))
    before = time.process_time()
    for number in range(count):
        socket.send_multipart([header, seal(number, raw)], copy=size < 2**16)
        _, frame = socket.recv_multipart(copy=False)
        unseal(number, frame.buffer, into)
    return time.process_time() - before


def connected(context: zmq.Context[Any], transport: str, keys: Any, server_key: bytes | None) -> zmq.Socket[bytes]:
    """A socket with a device's options."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    set_options(socket, transport, keys, server_key, 2**24)
    socket.sndhwm = 64
    return socket


def listen(pipe: Connection, transport: str, cipher: str) -> None:
    """The other process: does as many exchanges as it is told to, and says what they took."""
    context: zmq.Context[Any] = zmq.Context()
    zap = context.socket(zmq.REP)
    zap.bind("inproc://zeromq.zap.01")
    public, secret = zmq.curve_keypair()
    socket = connected(context, transport, (public, secret), None)
    pipe.send((socket.bind_to_random_port("tcp://127.0.0.1"), public))
    version, request, *_ = zap.recv_multipart()
    zap.send_multipart([version, request, b"200", b"OK", b"", b""])
    with contextlib.suppress(EOFError):  # the first process has ended
        while True:
            size, count = pipe.recv()
            pipe.send(exchange(socket, cipher, size, count))


class Pair:
    """Two connected processes, of which this is one."""

    def __init__(self, context: zmq.Context[Any], transport: str, cipher: str) -> None:
        """Start the other one, which ends with this one."""
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=listen, args=(theirs, transport, cipher), daemon=True)
        self.process.start()
        port, server_key = self.pipe.recv()
        self.socket = connected(context, transport, zmq.curve_keypair(), server_key)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.cipher = cipher

    def run(self, size: int, count: int) -> float:
        """Seconds of CPU that an exchange takes a process, the mean of both."""
        self.pipe.send((size, count))
        mine = exchange(self.socket, self.cipher, size, count)
        return (mine + float(self.pipe.recv())) / 2 / count


def main() -> None:
    """Print the tables."""
    print(record())
    context: zmq.Context[Any] = zmq.Context()
    pairs = {name: Pair(context, *kind) for name, kind in kinds().items()}
    print("CPU of each process for an exchange, ms (median), and its ratio to plain (median, least to largest)")
    for name, (size, times) in SIZES.items():
        count = max(2, int(SECONDS / 4 / max(pairs["curve"].run(size, 4), 1e-5)))
        found: dict[str, list[float]] = {kind: [] for kind in pairs}
        for number in range(ROUNDS):
            order = list(pairs) if number % 2 else list(reversed(pairs))
            for kind in order:
                found[kind].append(1e3 * times * pairs[kind].run(size, count))
        for kind, milliseconds in found.items():
            ratios = [a / b for a, b in zip(milliseconds, found["plain"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:>12} {kind:>12} {statistics.median(milliseconds):8.3f} ms  ratio {spread}", flush=True)
    print(
        "CPU of the forms on the wire, ms per MB of float32 (median of 5): to send, to receive; bytes against float32"
    )
    for shape in ((64, 64, 64), (64, 16, 16), (14, 14, 384), (4096,)):
        axis = len(shape) if shape[-1] == 384 else 1
        values = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
        for wire in WIRES[1:]:
            form = WireForm(wire, shape, axis, 16 if len(shape) == 1 else 1)
            sent = form.narrow(values)
            forth, back = (_milliseconds(work) * 2**20 / values.nbytes for work in _both(form, values, sent))
            print(f"{shape!s:>14} {wire:>8}: {forth:.2f}, {back:.2f}; {sent.nbytes / values.nbytes:.2f}")


def _both(form: WireForm, values: Any, sent: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return (lambda: form.narrow(values)), (lambda: form.widen(sent))


def _milliseconds(work: Callable[[], Any]) -> float:
    found = []
    for _ in range(ROUNDS):
        before = time.process_time()
        for _ in range(50):
            work()
        found.append(1e3 * (time.process_time() - before) / 50)
    return statistics.median(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
