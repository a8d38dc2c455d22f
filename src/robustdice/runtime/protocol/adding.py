"""Adding up the sums of a pair: what is missing of them, what can be added up, and who does.

All devices add up everything, or owners a slice each. Who owns a slice follows from the view, as who publishes any
shard does. What is special is that an owner needs sums which only it is sent. So when one dies, whoever takes over a
slice, in whatever stage the frame is by then, asks for its sums; all devices keep theirs until the frame is forgotten.
In a frame whose devices are in different views, a device also adds up what it is merely asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from robustdice.bundle.manifest import Manifest
from robustdice.runtime.protocol.events import RunPieces
from robustdice.runtime.wire.messages import ShardId, Shards

if TYPE_CHECKING:
    from robustdice.runtime.protocol.inflight import InFlight


def owner(frame: InFlight, shard: ShardId) -> int | None:
    """Who alone has a use for a shard: the owner of its slice. None for what is for everybody."""
    exchange, number = shard
    spec = frame.manifest.exchanges[exchange]
    return None if spec.owners is None else frame.publisher((spec.owners, number % len(spec.slices)))


def to_add_up(frame: InFlight, owners: int) -> list[int]:
    """What this device is to add up: the slices of an exchange that are its task, or that others have asked it for, and
    that it has not computed."""
    slices = ((owners, number) for number in range(len(frame.manifest.exchanges[owners].shards)))
    mine, absent = frame.manifest.device, (shard for shard in slices if shard not in frame.own)
    return [shard[1] for shard in absent if shard in frame.wanted or frame.publisher(shard) == mine]


def sums_for(frame: InFlight, owners: int, number: int) -> dict[ShardId, int]:
    """Sums that are missing of a slice, and who publishes them; those that were computed here are taken."""
    exchange = frame.manifest.sums_of[owners]
    numbers = frame.manifest.exchanges[exchange].in_slices[number]
    for shard in ((exchange, s) for s in numbers):
        if shard in frame.own and shard not in frame.sources:
            frame.offer([(shard, frame.own[shard])], frame.manifest.device, frame.lineage_of(shard))
    return _missing(frame, exchange, numbers)


def to_ask_for(frame: InFlight) -> list[ShardId]:
    """What this device is to add up though peers may not know: of the stage that has just been computed, and of the
    next one. Nothing while all goes straight."""
    if frame.straight is not None:
        return []
    manifest, mine = frame.manifest, frame.manifest.device
    here = manifest.stages[frame.stage].exchanges
    over = [(e, s) for e in here if e in manifest.sums_of for s in to_add_up(frame, e) if (e, s) not in frame.sources]
    next_ones = [e for e, sums in manifest.sums_of.items() if sums in here]
    asked = [(e, s) for e in next_ones for s in to_add_up(frame, e) if frame.publisher((e, s)) != mine]
    return over + asked


def take_late(frame: InFlight, message: Shards) -> None:
    """Take sums of a stage that is over, for slices that have become this device's task since."""
    late = [pair for pair in zip(message.parcel.shards, message.parcel.arrays, strict=True) if _of_use(frame, pair[0])]
    if late:
        frame.offer(late, message.sender, message.lineage)
        frame.owes = True


def _of_use(frame: InFlight, shard: ShardId) -> bool:
    exchange, number = shard
    spec = frame.manifest.exchanges[exchange]
    if spec.owners is None or frame.straight is not None:
        return False
    return number % len(spec.slices) in to_add_up(frame, spec.owners)


def ready(frame: InFlight, stage: int, incomplete: bool = False) -> tuple[ShardId, ...]:
    """What this device is to add up in a stage and has all sums for, or not all if ``incomplete``."""
    here = [e for e in frame.manifest.stages[stage].exchanges if e in frame.manifest.sums_of]
    mine = [(e, s) for e in here for s in to_add_up(frame, e)]
    return tuple(sorted(shard for shard in mine if incomplete or not sums_for(frame, *shard)))


def own_sums(frame: InFlight, lacking_from: int) -> frozenset[ShardId]:
    """Sums that it is this device's task to publish, and that it lacks itself for what it is to add up: of slices that
    others have asked for, or that somebody may lack, which are those from stage ``lacking_from`` on."""
    entered = [e for e, sums in frame.manifest.sums_of.items() if frame.entered((sums, 0))]
    slices = [(e, s) for e in entered for s in to_add_up(frame, e)]
    due = [shard for shard in slices if shard in frame.wanted or frame.ancestry.stage_of(shard) >= lacking_from]
    mine = frame.manifest.device
    return frozenset(s for shard in due for s, device in sums_for(frame, *shard).items() if device == mine)


def pieces_of(manifest: Manifest, stage: int, owned: tuple[ShardId, ...]) -> tuple[int, ...]:
    """The pieces that compute what is added up."""
    pieces = enumerate(manifest.stages[stage].pieces)
    return tuple(k for k, piece in pieces if manifest.is_owners(piece) and not set(owned).isdisjoint(piece.shards))


def take_over(frame: InFlight, stage: int, me: int, owned: tuple[ShardId, ...]) -> RunPieces:
    """Add up, in a stage that was entered, what has become this device's task."""
    gathered = []
    for shard in owned:
        exchange = frame.manifest.sums_of[shard[0]]
        shards = [(exchange, s) for s in frame.manifest.exchanges[exchange].in_slices[shard[1]]]
        parcel, frame.own_lineages[shard] = frame.gathered(stage - 1, me, shards)
        gathered.append(parcel)
    pieces = pieces_of(frame.manifest, stage, owned)
    return RunPieces(frame.id, stage, pieces, frame.down, tuple(gathered), owned)


def missing_here(frame: InFlight, exchange: int) -> dict[ShardId, int]:
    """Sums that are missing of all that this device is to add up in the stage after theirs, and who publishes them."""
    spec = frame.manifest.exchanges[exchange]
    slices = range(1) if spec.owners is None else to_add_up(frame, spec.owners)
    return {shard: device for s in slices for shard, device in _missing(frame, exchange, spec.in_slices[s]).items()}


def ask_for_sums_instead(frame: InFlight, owners: int, missing: dict[ShardId, int]) -> None:
    """In what is ``missing``, what this device is to add up itself gives way to the sums that it lacks for that."""
    for shard in ((owners, s) for s in to_add_up(frame, owners)):
        if missing.get(shard) == frame.manifest.device and (sums := sums_for(frame, *shard)):
            del missing[shard]
            missing.update(sums)


def _missing(frame: InFlight, exchange: int, shards: range) -> dict[ShardId, int]:
    """Sums of one slice whose turn it is, as long as they have neurons that no other has that is there."""
    sums, found = frame.ancestry.sums, dict[ShardId, int]()
    whole, best = frame.whole_holders()[exchange], frame.holders()[exchange]
    absent = [s for s in shards if (exchange, s) not in frame.sources or frame.poor((exchange, s))]
    there = _addable(frame, exchange, set(shards) - set(absent))
    covered = sums.neurons(exchange, there)
    # What is poor is asked for again only where another holder than such as have built on less has it.
    last = [s for s in absent if (d := best[s]) is not None and frame.outdone((exchange, s), d)]
    for holders, wanted in ((whole, absent), (best, last)):
        due = {s: device for s in wanted if (device := holders[s]) is not None}
        new = [s for s in due if sums.neurons(exchange, [s]) & ~covered]
        found.update({(exchange, s): due[s] for s in new})
        covered |= sums.neurons(exchange, new)
    return found


def _addable(frame: InFlight, exchange: int, shards: Iterable[int]) -> list[int]:
    """Of the sums of one slice that are there, those to be added up: of most neurons together, those first whose turn
    it is."""
    sums, holders = frame.ancestry.sums, frame.holders()[exchange]
    by_turn = sorted(shards, key=lambda s: (holders[s] is None, s))
    options = [sums.apart(exchange, order) for order in (by_turn, sorted(by_turn))]
    return max(options, key=lambda some: sums.neurons(exchange, some).bit_count())


def without_overlaps(frame: InFlight, held: dict[ShardId, int], poor: set[ShardId]) -> dict[ShardId, int]:
    """What is there but for sums of neurons that are in others, too; those that are not poor go first."""
    kept, sums = dict(held), frame.ancestry.sums
    exchanges = {e for e, _ in held if e in sums}
    for exchange, of_slice in [(e, each) for e in exchanges for each in frame.manifest.exchanges[e].in_slices]:
        mine = [s for e, s in held if e == exchange and s in of_slice]
        first = _addable(frame, exchange, [s for s in mine if (exchange, s) not in poor])
        then = sorted(s for s in mine if (exchange, s) in poor)
        for s in set(mine) - set(sums.apart(exchange, [*first, *then])):
            del kept[exchange, s]
    return kept
