"""A connection that ends while much of what it brought has not been read ends nothing but itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import zmq

LISTENS = """
import sys, time, zmq
from robustdice.runtime.wire.line import set_options
socket = zmq.Context().socket(zmq.ROUTER)
public, secret = sys.argv[1].encode(), sys.argv[2].encode()
set_options(socket, "curve", (public, secret), None, 1024)
port = socket.bind_to_random_port("tcp://127.0.0.1")
print(port, flush=True)
assert socket.poll(10_000)
peer = socket.recv_multipart()[0]
print("connected", flush=True)
assert sys.stdin.readline() == "go on\\n"
socket.send_multipart([peer, b"are you there"])  # what comes back is that it is not
time.sleep(0.3)
for number in range(1, int(sys.argv[3])):
    assert socket.poll(10_000), f"{number} of {sys.argv[3]} messages have come"
    socket.recv_multipart()
"""
SPEAKS = """
import sys, time, zmq
from robustdice.runtime.wire.keys import new_pair
from robustdice.runtime.wire.line import set_options
socket = zmq.Context().socket(zmq.DEALER)
set_options(socket, "curve", new_pair(), sys.argv[1].encode(), 1024)
socket.connect(f"tcp://127.0.0.1:{sys.argv[2]}")
for number in range(int(sys.argv[3])):
    if number == 1:
        sys.stdin.readline()
    socket.send(b"x")
time.sleep(1.2)
print("said", flush=True)
time.sleep(60)
"""
SAID = 256 + 30
"""More than a device's queue holds: it reads no further, until some of that was read."""


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def test_a_device_that_stood_still_outlives_a_peer_that_died_meanwhile() -> None:
    """libzmq 4.3 aborts the process where a heartbeat is to be answered on a connection that has ended by then."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    with started(LISTENS, public, secret, str(SAID)) as device:
        with started(SPEAKS, public, told(device), str(SAID)) as peer:
            assert told(device) == "connected"
            os.kill(device.pid, signal.SIGSTOP)
            try:
                tell(peer, "speak")
                assert told(peer) == "said"
            finally:
                peer.kill()
                peer.wait()
                os.kill(device.pid, signal.SIGCONT)
        tell(device, "go on")
        assert device.wait(20) == 0
