"""A running device: bundle, executor, engine and transport. ``python -m robustdice.runtime.device DIR/device-K``."""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustdice.bundle.read import Bundle, load_bundle
from robustdice.errors import BundleError, ClusterError, RobustdiceError
from robustdice.runtime.energy import SYSFS, EnergyMeter, find_gauges
from robustdice.runtime.executor import Executor
from robustdice.runtime.journal import say
from robustdice.runtime.memory import give_back, peak_rss_bytes, rss_bytes
from robustdice.runtime.protocol.engine import Engine
from robustdice.runtime.protocol.events import (
    Action,
    Note,
    Received,
    Send,
    Settings,
    Tick,
)
from robustdice.runtime.sessions import AUTO, GPU_PROVIDERS, provider_named
from robustdice.runtime.wire.address import Address
from robustdice.runtime.wire.codec import Codec
from robustdice.runtime.wire.config import CLUSTER_NAME, Cluster
from robustdice.runtime.wire.keys import SECRET_NAME, read_secret
from robustdice.runtime.wire.messages import Status, StatusRequest
from robustdice.runtime.wire.security import UNENCRYPTED
from robustdice.runtime.wire.transport import Transport
from robustdice.runtime.wire.zeromq import ZeroMQTransport
from robustdice.runtime.worker import Worker

log = logging.getLogger(__name__)

LONGEST_POLL_SECONDS = 0.2
"""So often a device looks whether it was asked to stop."""
LOOK_SECONDS = 0.005
"""While there is something to do, a device looks so often what its timers say."""
DRAIN_SECONDS = 0.01
"""So long does what has arrived come before a timer that is found to be due: after a device has stood still, what was
said meanwhile is read before anybody is blamed for silence. But not without end, so under any inflow a timer goes off
within this time and what it takes to deal with what two polls give."""
AT_A_TIME_SECONDS = 0.002
"""After computing for so long, a device looks whether anything has arrived."""


def run_device(
    bundle_directory: str | os.PathLike[str],
    cluster_file: str | os.PathLike[str] | None = None,
    threads: int = 1,
    settings: Settings | None = None,
    stop: threading.Event | None = None,
    provider: str = AUTO,
    sysfs: Path = SYSFS,
) -> None:
    """Serve the bundle in ``bundle_directory`` (``DIR/device-K``) until ``stop`` is set.

    ``cluster_file`` is by default the ``cluster.toml`` in the bundle's directory, or beside it; ``provider`` is what of
    ONNX Runtime computes, such as ``cpu`` or ``cuda``, where it can. BundleError when the bundle is damaged or of
    another plan than the cluster; ClusterError when the cluster file, the key, the port or the provider cannot be used.
    ``sysfs`` is where the kernel shows what energy the machine takes.
    """
    empty_rss_bytes = rss_bytes()
    provider = provider_named(provider)
    bundle = load_bundle(bundle_directory)
    manifest = bundle.manifest
    cluster = Cluster.read(cluster_file or _find_cluster(bundle))
    if cluster.plan_digest != manifest.plan_digest or len(cluster.devices) != manifest.devices:
        raise BundleError(
            f"{bundle.directory} is of plan {manifest.plan_digest[:12]} for {manifest.devices} devices, the cluster "
            f"runs plan {cluster.plan_digest[:12]} on {len(cluster.devices)}; copy all of one build"
        )
    executor = Executor(bundle, threads, provider)
    executor.try_out()
    give_back()
    keys = read_secret(bundle.directory / SECRET_NAME)
    engine = Engine(manifest, settings, secrets.token_hex(8))
    engine.views.prepare()
    codec = Codec(manifest.plan_digest, manifest, engine.views)
    entry, stop = cluster.devices[manifest.device], stop or threading.Event()
    transport = ZeroMQTransport(manifest.device, cluster, keys, codec)
    worker = Worker(executor, transport.waker())
    meter = EnergyMeter(*find_gauges(sysfs, gpu=not GPU_PROVIDERS.isdisjoint(executor.providers)))
    worker.start()
    try:
        if bound := transport.listen(stop):
            _introduce(manifest.device, bound, cluster, manifest.weight_bytes)

            def facts() -> dict[str, Any]:
                own = {"providers": executor.providers, "empty_rss_bytes": empty_rss_bytes}
                return {**own, "energy": meter.document()}

            Loop(engine, transport, worker, entry.name, facts).run(stop)
    finally:
        worker.stop()
        meter.close()
        transport.close()
        say(log, f"{entry.name} has stopped", event="stopped", device=manifest.device)


def _introduce(device: int, bound: Address, cluster: Cluster, weight_bytes: int) -> None:
    """Say who this is and where it really listens."""
    entry = cluster.devices[device]
    where = entry.address if str(bound) == entry.address else f"{bound} (its address is {entry.address})"
    text = f"{entry.name} listens on {where}, holds {weight_bytes / 1e6:.2f} MB of weights"
    say(log, text, event="started", device=device)
    if cluster.transport == "plain":
        text = f"{entry.name}: {UNENCRYPTED}"
        say(log, text, event="unencrypted", device=device, level=logging.WARNING)
    if entry.listen is None and bound.loopback and not cluster.one_machine:
        host = Address.parse(entry.address).host
        text = (
            f"{entry.name} listens on {bound} only, for that is what {host} means on this machine: no other machine "
            "can reach it. Correct its address in cluster.toml, or the name in /etc/hosts, or add "
            f'listen = "tcp://*:{bound.port}" there'
        )
        say(log, text, event="loopback", device=device, reason=f"{host} is {bound.host}", level=logging.WARNING)


class Loop:
    """Carries events to the engine and its actions to where they belong; the one place with a clock."""

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        worker: Worker,
        name: str,
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Everything is built and listens; nothing is read before :meth:`run`. ``facts`` is what whoever started this
        knows, for ``status``."""
        self._facts = facts
        self._engine, self._transport, self._worker, self._name = engine, transport, worker, name
        self._started = time.monotonic()
        self._unsent = 0
        self._due = 0.0
        """When the next timer is due, as the engine said last."""
        self._look_at = 0.0
        """When to ask it again, if something has happened since."""
        self._stale = False
        self._overdue_since = math.inf
        """When a timer was found to be due that has not gone off yet."""

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set."""
        while not stop.is_set():
            self._turn()

    def _turn(self) -> None:
        """Deal with what has happened, or wait for something to; look to the timers when nothing more has arrived."""
        now = time.monotonic()
        if self._stale and now >= self._look_at:
            self._look(now)
        until = min(self._due, self._look_at) if self._stale else self._due
        wait = 0.0 if self._worker.at_hand else min(max(until - now, 0.0), LONGEST_POLL_SECONDS)
        happened = self._read(wait)
        self._stale |= happened
        now = time.monotonic()
        if now < self._due:
            self._overdue_since = math.inf
            return
        self._overdue_since = min(self._overdue_since, now)
        if not happened or now - self._overdue_since >= DRAIN_SECONDS:
            self._overdue_since = math.inf
            self._look(now)
            if now >= self._due:
                self._act(self._engine.handle(Tick(self._due), now))
                self._stale = True

    def _look(self, now: float) -> None:
        """Ask when the next timer is due: that takes too long to do it whenever something happens."""
        self._due, self._look_at, self._stale = self._engine.next_due(now), now + LOOK_SECONDS, False

    def _read(self, wait_seconds: float) -> bool:
        """Whether anything has arrived or was computed; it is dealt with."""
        events = self._transport.poll(wait_seconds)
        for event in events:
            if isinstance(event, Received) and isinstance(event.message, StatusRequest):
                self._unsent += not self._transport.send(event.message.client, self._status())
            self._act(self._engine.handle(event, time.monotonic()))
        happened = bool(events)
        started = now = time.monotonic()
        while now - started < AT_A_TIME_SECONDS and (result := self._worker.result()) is not None:
            now = time.monotonic()
            self._act(self._engine.handle(result, now))
            happened = True
        return happened

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._unsent += not self._transport.send(action.to, action.message)
            elif isinstance(action, Note):
                say(
                    log,
                    f"{self._name}: {action.text}",
                    event=action.event,
                    device=self._engine.me,
                    peer=action.peer,
                    frame=action.frame,
                    reason=action.reason,
                )
            else:
                self._worker.give(action)

    def _status(self) -> Status:
        manifest, now = self._engine.manifest, time.monotonic()
        document: dict[str, Any] = {
            "name": self._name,
            "device": manifest.device,
            "devices": manifest.devices,
            "plan_digest": manifest.plan_digest,
            "spares": manifest.spares,
            "weights_bytes": manifest.weight_bytes,
            "process": os.getpid(),
            "uptime_seconds": now - self._started,
            "cpu_seconds": time.process_time(),
            **self._facts(),
            "rss_bytes": rss_bytes(),
            "peak_rss_bytes": peak_rss_bytes(),
            "dropped_messages": self._transport.dropped,
            "unsent_messages": self._unsent,
            **self._engine.status(now),
            **self._transport.status(now),
            "model": {
                "input_shape": manifest.input_shape,
                "outputs": manifest.outputs,
                "classes": manifest.classes,
                "preprocessing": dict(manifest.preprocessing),
                "activation": manifest.activation,
                "exchanges": len(manifest.exchanges),
            },
        }
        down = set(range(manifest.devices)) - set(document["up"])
        if len(down) >= min(map(len, manifest.calibrated), default=manifest.devices):  # smaller sets are to have none
            which = manifest.calibrated_for(down)
            document["corrected_for"] = None if which is None else manifest.calibrated[which]
        return Status(manifest.device, document)


def _find_cluster(bundle: Bundle) -> Path:
    places = [bundle.directory / CLUSTER_NAME, bundle.directory.resolve().parent / CLUSTER_NAME]
    for place in places:
        if place.is_file():
            return place
    raise ClusterError(f"neither {places[0]} nor {places[1]} exists; name the cluster file with --cluster")


def _stop_with_parent(stop: threading.Event) -> None:
    """Stop when standard input ends: whoever started this process is gone, however it went.

    In a process group of its own, the kernel also wakes and ends a process that is frozen then (POSIX: SIGHUP and
    SIGCONT to a newly orphaned process group with stopped members).
    """
    os.setpgid(0, 0)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """The command line of one device process."""
    parser = argparse.ArgumentParser(prog="python -m robustdice.runtime.device", description=run_device.__doc__)
    parser.add_argument("bundle", help="DIR/device-K")
    parser.add_argument("--cluster", help="cluster.toml (default: in the bundle's directory, or beside it)")
    parser.add_argument("--threads", type=int, default=1, help="threads inside one computation (default: 1)")
    parser.add_argument("--provider", default=AUTO, help="what of ONNX Runtime computes (default: auto)")
    parser.add_argument("--watch-stdin", action="store_true", help="stop when standard input ends")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.watch_stdin:
        _stop_with_parent(stop)
    try:
        run_device(options.bundle, options.cluster, options.threads, stop=stop, provider=options.provider)
    except RobustdiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
