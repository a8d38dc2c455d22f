"""Scenarios for a simulated cluster: drawn from a seed, played, judged, and shrunk to what is needed to fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from bundles import make_plan
from robustdice.plan import Plan
from robustdice.runtime.wire.messages import Answer
from simulated_network import Network
from simulation import PAUSE_SECONDS, World
from tokens import Truth, held_by

SPLITS = ("neurons", "interleaved", "parity", "hidden", "rows", "whole", "rows and whole")
"""Of ``hidden`` ones a part has owners: with three devices or more."""
WIRES = ("float32", "float16", "uint8")
GONE = frozenset({"crash", "flapping", "restart", "silent crash", "freeze"})
"""A device is not there for a while. All others have what it takes, and get it from each other."""
NOTICED = frozenset({"crash", "flapping", "restart"})
"""Peers are told: no time may be lost."""
HARMLESS = frozenset({"clock jump"})
KINDS = (
    *("crash", "silent crash", "restart", "flapping", "freeze", "slow device", "overload", "clock jump"),
    *("one way", "deaf", "mute", "two ways", "client cut", "delay", "loss", "corruption"),
)
"""Of faults that begin and end. What a scenario has from first to last: messages sent twice and out of order, several
clients, clocks that disagree, processes that pause."""
FIRST_FAULT = 0.45
RECOVERY_SECONDS = 6.0
"""After the last fault every device answers with everything, from primaries, within this time: the longest back-off
(5 s), and what a device needs to show that it keeps up."""
RECONNECTION_SECONDS = 0.1
RECOVERY_FRAMES = 2
"""So many frames of each client at most may still lack something when devices have connected again after the last fault
and no back-off is left: 0.05 s after a fault, up to 5 s for a device that has kept others waiting for long of late."""
STANDSTILL_SECONDS = 0.02
"""So long may nothing at all move for a frame whose devices are told of every fault."""
TWO_YEARS = 6e7


@dataclass(frozen=True)
class Fault:
    """Something that begins at ``start`` and is over ``length`` seconds later. What ``device``, ``other`` and
    ``strength`` (0 to 1) mean depends on the ``kind``."""

    kind: str
    start: float
    length: float
    device: int
    other: int
    strength: float

    @property
    def end(self) -> float:
        return self.start + self.length


Step = Callable[[World, Fault], None]


@dataclass(frozen=True)
class Scenario:
    """A cluster and what happens to it. Equal scenarios go the same way."""

    seed: int
    devices: int = 3
    holders: int = 2
    split: str = "neurons"
    wire: str = "float32"
    spares: str = "standby"
    window: int = 3
    prune: bool = False
    clients: int = 1
    interval: float = 0.05
    timeout_seconds: float = 2.0
    duplication: float = 0.0
    reordering: bool = False
    clocks: float = 0.0
    """Devices' clocks differ by up to so many seconds."""
    pauses: bool = False
    """Devices and clients stand still for a moment now and then."""
    faults: tuple[Fault, ...] = field(default=())

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(fault.kind for fault in self.faults)

    @property
    def calm(self) -> float:
        """When the last fault is over."""
        return max([1.0, *(fault.end for fault in self.faults)])


def draw(seed: int) -> Scenario:
    """The scenario of a seed, which goes without a random part of all that may happen."""
    random_ = random.Random(seed)  # noqa: S311
    split = random_.choice(SPLITS)
    devices = random_.choice([2, 3, 3, 4] if "rows" in split else [2, 3, 3, 3, 4, 5])
    left_out = random_.choice([0.2, 0.6, 0.85])
    allowed = [kind for kind in KINDS if random_.random() >= left_out] or [random_.choice(KINDS)]
    always = [random_.random() >= left_out for _ in range(4)]
    faults = []
    for _ in range(random_.randint(1, 5)):
        kind, start, length = random_.choice(allowed), FIRST_FAULT + 0.9 * random_.random(), random_.random()
        device, other = random_.sample(range(devices), 2)
        if kind in {"freeze", "restart"} and random_.random() < 0.5:
            length *= 0.25
        faults.append(Fault(kind, start, length, device, other, random_.random()))
    return Scenario(
        seed=seed,
        devices=devices,
        holders=random_.choice([1, 2, 2, min(3, devices)]),
        split=split,
        wire="float32" if split == "parity" else random_.choice(WIRES),
        spares=random_.choice(["hot", "standby"]),
        window=random_.choice([1, 3, 6]),
        prune=random_.random() < 0.3,
        clients=random_.choice([2, 3]) if always[0] else 1,
        timeout_seconds=random_.choice([1.0, 2.0]),
        duplication=0.05 if always[1] else 0.0,
        reordering=always[2],
        clocks=1e6 if always[3] else 0.0,
        faults=tuple(faults),
        pauses=random_.random() < 0.3,
    )


@cache
def plan_of(devices: int, holders: int, split: str, wire: str) -> Plan:
    if split == "parity":
        return make_plan(devices, parity=True)
    return make_plan(
        devices,
        holders,
        interleaved=split == "interleaved",
        wire=wire,
        pair=split == "hidden",
        owned=split == "hidden" and devices > 2 and holders != 1,
        rows="rows" in split,
        whole="whole" in split,
    )


def play(scenario: Scenario, log: list[str] | None = None) -> World:
    """The world when all is over. AssertionError with the reason when something is not as it must be."""
    s = scenario
    network = Network(duplication=s.duplication, reordering=s.reordering)
    plan = plan_of(s.devices, s.holders, s.split, s.wire)
    world = World(plan, s.seed, s.spares, network, s.window, s.prune)
    world.interval, world.timeout_seconds, world.log = s.interval, s.timeout_seconds, log
    for node in world.nodes:
        node.offset = s.clocks * world.random.random()
    world.judge = Judge(scenario, world)
    for fault in s.faults:
        _schedule(fault, world)
    world.at(s.calm, world.end_faults)
    for k in range(s.clients):
        world.start_client(0.2, s.calm + RECOVERY_SECONDS + 1.0, f"c{k}")
    if s.pauses:
        world.let_pause()
    world.run(s.calm)
    world.interval, world.window = 0.1, max(8, s.window)
    _recover(world, s)
    world.check()
    return world


def _recover(world: World, scenario: Scenario) -> None:
    """Wait until all is as before, and has been for half a second; then see that nothing is left of any frame."""
    end = scenario.calm + RECOVERY_SECONDS
    world.run(scenario.calm + 0.4)
    while not _whole(world, max(scenario.calm, world.now - 0.6), scenario):
        assert world.now < end, f"full coverage from primaries did not return within {RECOVERY_SECONDS:g} s"
        world.run(world.now + 0.2)
    let_in = [
        peer.not_before - node.offset
        for node in world.nodes
        if node.engine
        for peer in node.engine.membership.peers.values()
    ]
    ready = max(scenario.calm + RECONNECTION_SECONDS, *let_in)
    lacking = [n for n, whole in _wholes(world, ready, scenario).items() if not whole and n not in world.refused]
    assert len(lacking) <= RECOVERY_FRAMES * scenario.clients, (
        f"{len(lacking)} frames lacked something after all faults"
    )
    world.drain()


def _whole(world: World, since: float, scenario: Scenario) -> bool:
    wholes = _wholes(world, since, scenario)
    return bool(wholes) and all(wholes.values())


def _wholes(world: World, since: float, scenario: Scenario) -> dict[int, bool]:
    """Of frames that were sent since then, and have had the time: whether all devices have answered with everything."""
    time = 0.1 + 4 * PAUSE_SECONDS * scenario.pauses
    every = 1 if scenario.prune else scenario.devices
    each = {n: world.answers.get(n, []) for n, at in world.sent.items() if since <= at < world.now - time}
    return {
        number: len(given) >= every and all(a.coverage == 1.0 and a.from_spares == 0.0 and not a.down for _, a in given)
        for number, given in each.items()
    }


class Judge:
    """What a scenario's faults allow an answer to lack."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self._scenario, self._world = scenario, world
        self._first = min((fault.start for fault in scenario.faults), default=scenario.calm)
        others = [fault.start for fault in scenario.faults if fault.kind not in GONE | HARMLESS]
        self._clear = min(others, default=scenario.calm)
        """Until then devices come and go at most."""
        unnoticed = [fault.start for fault in scenario.faults if fault.kind not in NOTICED | HARMLESS]
        self._told = min(unnoticed, default=scenario.calm)
        """Until then their peers are told."""
        self._hit = {d: min([f.start for f in scenario.faults if f.device == d], default=9e9) for d in range(16)}
        self._least = cache(partial(held_by, world.nodes[0].manifest))

    def __call__(self, device: int, answer: Answer, truth: Truth) -> None:
        world, number, coverage = self._world, answer.frame.number, min(truth.present, default=1)
        # What a device refuses, because it has too much to do, others do without it.
        if world.now < self._first and number not in world.refused:
            as_usual = coverage == 1 and not any(truth.spares) and not answer.down and answer.expected == 1.0
            assert as_usual, f"nothing has happened yet, and frame {number} of device {device} is not as usual"
        if world.now < self._clear:
            well = [d for d in range(self._scenario.devices) if self._hit[d] > world.now]
            if device in well and number not in world.refused:
                least = self._least(tuple(well))
                wrong = f"frame {number} of device {device} has {float(coverage):.3f}, devices {well} had {least:.3f}"
                assert coverage >= least - 1e-9, wrong
                stood = world.standstill - world.stood[number]
                wrong = f"for frame {number} of device {device} nothing moved for {stood:.3f} s"
                pauses = self._scenario.pauses
                assert pauses or world.now >= self._told or stood <= STANDSTILL_SECONDS, wrong


def _schedule(fault: Fault, world: World) -> None:
    if fault.kind == "flapping":
        for k in range(4):
            world.at(fault.start + k * fault.length / 4, world.crash, fault.device)
            world.at(fault.start + (k + 0.3 + 0.6 * fault.strength) * fault.length / 4, world.restart, fault.device)
        return
    begin, end = _STEPS[fault.kind]
    world.at(fault.start, begin, world, fault)
    world.at(fault.end, end, world, fault)


def _set(name: str, most: float) -> tuple[Step, Step]:
    """What happens to messages."""

    def begin(world: World, fault: Fault) -> None:
        setattr(world.network, name, most * fault.strength)

    def end(world: World, _: Fault) -> None:
        setattr(world.network, name, 0.0)

    return begin, end


def _flood(world: World, _: Fault) -> None:
    world.interval, world.window = 0.001, 20


def _ebb(world: World, _: Fault) -> None:
    world.interval, world.window = 0.05, 3


def _restart(world: World, fault: Fault) -> None:
    """With an empty memory: half of them unnoticed."""
    if fault.strength < 0.5:
        world.replace(fault.device)
    else:
        world.crash(fault.device)


def _back(world: World, fault: Fault) -> None:
    world.restart(fault.device)


def _heal(world: World, fault: Fault) -> None:
    world.heal(fault.device)


_STEPS: dict[str, tuple[Step, Step]] = {
    "crash": (lambda world, fault: world.crash(fault.device), _back),
    "silent crash": (lambda world, fault: world.crash(fault.device, silent=True), _back),
    "restart": (_restart, _back),
    "freeze": (lambda world, fault: world.freeze(fault.device), lambda world, fault: world.thaw(fault.device)),
    "slow device": (
        lambda world, fault: world.slow_down(fault.device, 1 + 9 * fault.strength),
        lambda world, fault: world.slow_down(fault.device, 1.0),
    ),
    "overload": (_flood, _ebb),
    "clock jump": (lambda world, fault: world.jump(fault.device, TWO_YEARS * fault.strength**8), lambda *_: None),
    "one way": (lambda world, fault: world.cut_one_way(fault.device, fault.other), _heal),
    "two ways": (lambda world, fault: world.partition(fault.device, fault.other), _heal),
    "deaf": (lambda world, fault: world.deafen(fault.device), _heal),
    "mute": (lambda world, fault: world.mute(fault.device), _heal),
    "client cut": (lambda world, fault: world.cut_client("c0", fault.device), _heal),
    "delay": _set("slow", 0.3),
    "loss": _set("loss", 0.2),
    "corruption": _set("corruption", 0.1),
}
"""How each kind begins and ends."""


def failure(scenario: Scenario) -> str | None:
    """Why a scenario fails, or None when it does not."""
    try:
        play(scenario)
    except Exception as error:  # whatever an engine raises is a failure, too
        return f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
    return None


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool] = lambda s: failure(s) is not None) -> Scenario:
    """A smaller scenario that fails as well: with fewer faults, then with less that is always there, then with shorter
    ones. ``scenario`` fails."""
    while (smaller := next(filter(fails, _smaller(scenario)), None)) is not None:
        scenario = smaller
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    faults = scenario.faults
    for k in range(len(faults)):
        yield replace(scenario, faults=(*faults[:k], *faults[k + 1 :]))
    plain: dict[str, Any] = {
        "clients": 1,
        "duplication": 0.0,
        "reordering": False,
        "clocks": 0.0,
        "prune": False,
        "pauses": False,
    }
    for name, value in (plain | {"window": 1, "wire": "float32"}).items():
        if getattr(scenario, name) != value:
            yield replace(scenario, **{name: value})
    for k, fault in enumerate(faults):
        if fault.length > 0.02:
            yield replace(scenario, faults=(*faults[:k], replace(fault, length=fault.length / 2), *faults[k + 1 :]))
