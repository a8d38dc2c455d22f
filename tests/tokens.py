"""What stands for arrays in a simulated world: tokens, from which it can be read off what a value was assembled from.

None of it asks the engine: this is the other way to the same coverage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from robustdice.bundle.manifest import Exchange, Manifest
from robustdice.plan import publishers
from robustdice.runtime.wire.messages import FrameId, Parcel, ShardId


@dataclass(frozen=True)
class Truth:
    """What something was really computed from: for every exchange so far the share of its neurons that is in it, and
    the share that came from spares; and which devices were taken for down when any part of it was computed."""

    present: tuple[Fraction, ...] = ()
    spares: tuple[Fraction, ...] = ()
    taken_down: frozenset[frozenset[int]] = field(default=frozenset(), compare=False)

    def in_view(self, down: frozenset[int]) -> Truth:
        """What is computed from it while the devices ``down`` are."""
        return self if down in self.taken_down else replace(self, taken_down=self.taken_down | {down})


@dataclass(frozen=True)
class Token:
    """Stands for a shard's array."""

    frame: FrameId
    shard: ShardId
    device: int
    built_on: Truth


def assembled(
    manifest: Manifest,
    stage: int,
    before: Truth,
    gathered: Sequence[Parcel],
    owned: Sequence[ShardId] = (),
    late: bool = False,
) -> Truth:
    """What is known once a device that had ``before`` in a stage has taken the shards gathered there; a single one that
    is missing is worked out from the parity shard and all others. Of sums in slices, those that are ``owned``; of a
    ``late`` one, nothing else. AssertionError when a neuron is in it twice."""
    tokens = {s: t for parcel in gathered for s, t in zip(parcel.shards, parcel.arrays, strict=True)}
    present, spares, known = list(before.present), list(before.spares), range(len(before.present))
    for e in manifest.stages[stage].exchanges:
        exchange = manifest.exchanges[e]
        shards = exchange.shards
        parts = [(s, t.device, t.built_on) for (of, s), t in tokens.items() if of == e and shards[s].neurons]
        parts += _made_up_for(exchange, {s: token for (of, s), token in tokens.items() if of == e})
        sizes = {s: len(shards[s].neurons) for s, _, _ in parts}
        if any(truth != before for _, _, truth in parts):
            for k in known:
                in_them = sum((sizes[s] * truth.present[k] for s, _, truth in parts), Fraction())
                of_spares = sum((sizes[s] * truth.spares[k] for s, _, truth in parts), Fraction())
                present[k] = min(present[k], in_them / sum(sizes.values()))
                spares[k] = max(spares[k], of_spares / sum(sizes.values()))
        here = [exchange.in_slices[s] for owners, s in owned if owners == exchange.owners]
        assert exchange.owners is None or all(any(s in each for each in here) for s in sizes), "sums of no use"
        told = [(Fraction(1), Fraction(0))]
        for slice_ in here if exchange.owners is not None else [] if late else exchange.in_slices:
            there = [n for s in sizes if s in slice_ for n in shards[s].neurons]
            assert len(set(there)) == len(there), "a neuron counts twice"
            of = [s for s, d, _ in parts if s in slice_ and (shards[s].after or d != shards[s].devices[0])]
            told.append((Fraction(len(there), exchange.neurons), Fraction(sum(sizes[s] for s in of), exchange.neurons)))
        present.append(min(share for share, _ in told))
        spares.append(max(share for _, share in told))
    taken_down = before.taken_down.union(*(token.built_on.taken_down for token in tokens.values()))
    return Truth(tuple(present), tuple(spares), taken_down)


def _made_up_for(exchange: Exchange, tokens: dict[int, Token]) -> list[tuple[int, int, Truth]]:
    """The shard that the parity shard gives, as good as the worst that it is worked out from."""
    last = len(exchange.shards) - 1
    absent = [member for member in exchange.shards[last].parity_of if member not in tokens]
    if len(absent) != 1 or last not in tokens:
        return []
    used = [token.built_on for token in tokens.values()]
    present = tuple(map(min, zip(*(truth.present for truth in used), strict=True)))
    spares = tuple(map(max, zip(*(truth.spares for truth in used), strict=True)))
    return [(absent[0], tokens[last].device, Truth(present, spares))]


def held_by(manifest: Manifest, devices: Iterable[int]) -> float:
    """The least share of an exchange's neurons that some devices have between them."""
    down = set(range(manifest.devices)) - set(devices)
    shares = [1.0]
    for exchange in manifest.exchanges:
        shards = exchange.shards
        there = {s for s, device in enumerate(publishers(shards, down)) if device is not None}
        absent = [member for member in shards[-1].parity_of if member not in there]
        if len(absent) == 1 and len(shards) - 1 in there:
            there.add(absent[0])
        neurons = {neuron for s in there for neuron in shards[s].neurons}
        shares.append(len(neurons) / exchange.neurons)
    return min(shares)
