"""A frame's state on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from robustdice.runtime.protocol import adding
from robustdice.runtime.protocol.events import RunPieces, RunStage
from robustdice.runtime.protocol.lineage import TOLERANCE
from robustdice.runtime.protocol.state import Phase, State
from robustdice.runtime.protocol.views import Holders
from robustdice.runtime.wire.messages import Array, Lineage, Parcel, ShardId, Shards


class InFlight(State):
    """One admitted frame, and what follows from what is known of it."""

    @property
    def _hot(self) -> bool:
        return self.manifest.spares == "hot"

    @property
    def down(self) -> frozenset[int]:
        """The devices that take no part, in the frame's view."""
        if self.straight is not None:
            return self.straight.down
        return frozenset(range(self.manifest.devices)) - self.live

    def expected_accuracy(self) -> float | None:
        """What was measured for the devices that are down, if the frame was computed from first to last as it was
        measured: in one view, every shard from its publisher, here and wherever they were computed. None where nobody
        has measured it."""
        certificate, view = self.manifest.certificate, tuple(sorted(self.live))
        if certificate is None or self.built[-1].view != view or frozenset(view) != self.admitted_with:
            return None
        return certificate.expected(self.down)

    def publisher(self, shard: ShardId) -> int | None:
        """The first holder in this frame's view, of those that have not built on less if there is one; of a parity
        shard, only while one of its members has none, or one that has none has not come all the same."""
        number, position = shard
        members = self.manifest.exchanges[number].shards[position].parity_of
        if not members:
            return self.holder(shard)
        alone = [m for m in members if self.whole_holder((number, m)) is None]
        of_use = len(alone) == 1 or [(number, m) in self.sources for m in alone].count(False) == 1
        return self.whole_holder(shard) if of_use else None

    def holder(self, shard: ShardId) -> int | None:
        """The first live one of most worth."""
        return self.holders()[shard[0]][shard[1]]

    def whole_holder(self, shard: ShardId) -> int | None:
        """The first live one of those that have not built on less."""
        return self.whole_holders()[shard[0]][shard[1]]

    def holders(self) -> Holders:
        """Of every shard the first live one of most worth."""
        return self._holders()[1]

    def whole_holders(self) -> Holders:
        """Of every shard the first live one of those that have not built on less."""
        return self._holders()[0]

    def _holders(self) -> tuple[Holders, Holders]:
        """Those that have not built on less, and all live ones, for as long as these are the same."""
        seen = len(self.live), len(self.lesser)
        if self.looked_up is None or self.looked_up[0] != seen:
            whole, find = frozenset(self.live - self.lesser), self.ancestry.views.holders
            self.looked_up = seen, (find(whole), find(whole, frozenset(self.live) - whole))
        return self.looked_up[1]

    def replaceable(self, device: int) -> bool:
        """Whether this frame can have everything without ``device``, in its view: what this stage misses of it, and
        what later stages would."""
        if self.ancestry.needs(device, self.live, self.stage + 1):
            return False
        view = replace(self, live=self.live - {device})
        lost = [shard for shard, publisher in self.missing().items() if publisher == device]
        return all(view.holder(shard) is not None or view._made_up_for(shard) for shard in lost)

    def _made_up_for(self, shard: ShardId) -> bool:
        """Whether others, or what is there, have all that is in a shard that nobody holds."""
        exchange, number = shard
        others = [s for e, s in self.missing() if e == exchange]
        if exchange not in self.ancestry.sums:
            return any(self._is_parity((exchange, s)) for s in others)
        others += [s for e, s in self.sources if e == exchange]
        sums, spec = self.ancestry.sums, self.manifest.exchanges[exchange]
        others = [s for s in others if s in spec.in_slices[number % len(spec.in_slices)]]
        return not sums.neurons(exchange, [number]) & ~sums.neurons(exchange, others)

    def entered(self, shard: ShardId) -> bool:
        """Whether the stage that a shard is computed in was entered."""
        return self.ancestry.stage_of(shard) < len(self.built) and (self.stage > 0 or self.phase is not Phase.READY)

    def lineage_of(self, shard: ShardId) -> Lineage:
        """What a shard that was computed here is built on."""
        return self.own_lineages.get(shard) or self.built[self.ancestry.stage_of(shard)]

    def take_straight(self, message: Shards) -> bool:
        """While straight: take what a peer publishes in this stage or a later one, if it is what the view says."""
        sender, _, _, stage, parcel, lineage = message
        view = self.straight
        if view is None or stage < self.stage or self.phase is Phase.DONE or lineage != view.lineage:
            return False
        if view.due[stage].get(sender) != parcel.shards:
            return False
        self.parcels.setdefault((stage, sender), parcel)
        return True

    def take(self, message: Shards) -> None:
        """Take what a peer publishes in this stage or a later one."""
        if self.take_straight(message):
            return
        parcel = message.parcel
        self.unfold()
        self.said[message.stage, message.sender] = message.lineage
        self.offer(zip(parcel.shards, parcel.arrays, strict=True), message.sender, message.lineage)

    def unfold(self) -> None:
        """From now on every shard is looked after by itself, for something irregular happens."""
        view, self.straight = self.straight, None
        if view is None:
            return
        used = self.stage - (self.phase is Phase.READY)
        """The stages before this one have been used."""
        for stage in range(used):
            for device, shards in view.due[stage].items():
                self.sources.update(dict.fromkeys(shards, device))
        for (stage, device), parcel in self.parcels.items():
            arrays = dict(zip(parcel.shards, parcel.arrays, strict=True))
            self.sources.update(dict.fromkeys(arrays, device))
            if device == self.manifest.device:
                self.own.update(arrays)
                self.published.update(arrays)
            if stage >= used:
                self.got.update(arrays)
        self.lineages = dict.fromkeys(self.sources, view.lineage)
        for parcel in self.spared:
            self.own.update(zip(parcel.shards, parcel.arrays, strict=True))
        self.parcels.clear()
        self.spared.clear()

    def computed(self, task: RunStage | RunPieces, parcels: tuple[Parcel, ...]) -> tuple[Parcel, ...] | None:
        """Keep what was computed here. While straight: what of it is to be published."""
        if self.straight is None:
            for parcel in parcels:
                self.own.update(zip(parcel.shards, parcel.arrays, strict=True))
            built = self.built[task.stage]
            if built.view is not None and not task.down.isdisjoint(built.view):
                # Not all of this stage was corrected for the view that the frame was in when it entered it.
                self.built[task.stage] = self.ancestry.shares(built, task.stage)
            return None
        mine = int(self.manifest.device in self.straight.due[task.stage])
        if mine:
            self.parcels[task.stage, self.manifest.device] = parcels[0]
        self.spared += parcels[mine:]
        due = parcels[: len(self.straight.parcels[task.stage])]
        for parcel in due[mine:]:  # for their owners
            self.published.update(parcel.shards)
        return due

    @property
    def complete(self) -> bool:
        """Nothing that has a live publisher is missing of this stage."""
        if self.straight is None:
            return not self.missing()
        return self.straight.awaited[self.stage] <= self.parcels.keys()

    @property
    def buffered(self) -> int:
        """Shards that are kept."""
        parcels = sum(len(parcel.shards) for parcel in (*self.parcels.values(), *self.spared))
        return parcels + len(self.got) + len(self.own)

    def retire(self) -> None:
        """It was answered or given up: what came from others is of no use any more."""
        self.phase = Phase.DONE
        self.got.clear()
        mine = self.manifest.device
        self.parcels = {key: parcel for key, parcel in self.parcels.items() if key[1] == mine}

    def offer(self, shards: Iterable[tuple[ShardId, Array]], source: int, lineage: Lineage) -> None:
        """Take shards for this stage or later ones, of one lineage; of several copies the first that is worth most."""
        for shard, array in shards:
            if shard in self.sources:
                known, stage = self.lineages[shard], self.ancestry.stage_of(shard)
                if shard not in self.got or not self.ancestry.less(known, lineage, stage):
                    continue
            self.got[shard], self.sources[shard], self.lineages[shard] = array, source, lineage

    def poor(self, shard: ShardId) -> bool:
        """Whether a shard came from a device that has built on less than this one."""
        stage = self.ancestry.stage_of(shard)
        return shard in self.sources and self._less(self.lineages[shard], stage)

    def _less(self, lineage: Lineage, stage: int) -> bool:
        """Whether it is worth less than what this device's part of a stage is built on. Nearly always it is that."""
        built = self.built[stage]
        return lineage != built and self.ancestry.less(lineage, built, stage)

    def poorer(self) -> set[int]:
        """Devices that this stage shows to have built on less, and that were not known to."""
        stage, sources, lineages = self.stage, self.sources, self.lineages
        held = [(sources[shard], lineages[shard]) for shard in self.ancestry.shards_of[stage] if shard in sources]
        # Also where another's copy was there already, which is worth no less.
        said = [(device, self.said.get((stage, device))) for device in range(self.manifest.devices)]
        return {d for d, lineage in held + said if lineage is not None and self._less(lineage, stage)} - self.lesser

    def missing(self) -> dict[ShardId, int]:
        """What this stage still waits for: shards that have not come, and their live publishers. Of a shard that is
        poor, another holder's copy; of holders that have built on less, only what nobody else can give."""
        found: dict[ShardId, int] = {}
        for exchange in self.manifest.stages[self.stage].exchanges:
            if exchange in self.ancestry.sums:
                found.update(adding.missing_here(self, exchange))
                continue
            shards = self.manifest.exchanges[exchange].shards
            absent = [
                number
                for number in range(len(shards))
                if (shard := (exchange, number)) not in self.sources or self._less(self.lineages[shard], self.stage)
            ]
            if not absent:
                continue
            whole = self.whole_holders()[exchange]
            holders = {s: whole[s] for s in absent}
            # Of a parity shard counts what came, not who is up: a member's device may have died after sending it.
            lost = [s for s, device in holders.items() if device is None and not shards[s].parity_of]
            parity = len(shards) - 1 if shards[-1].parity_of else None
            found.update({(exchange, s): d for s, d in holders.items() if d is not None and s != parity})
            if parity is not None and len(lost) == 1:
                if parity not in absent:
                    continue
                if (stand_in := holders[parity]) is not None:
                    found[exchange, parity] = stand_in
                    continue
            for s in lost:
                device = self.holder((exchange, s))
                if device is not None and self.outdone((exchange, s), device):
                    found[exchange, s] = device
            if exchange in self.manifest.sums_of:
                adding.ask_for_sums_instead(self, exchange, found)
        return {shard: device for shard, device in found.items() if not self._done_here(shard, device)}

    def _done_here(self, shard: ShardId, publisher: int) -> bool:
        """Whether this device has computed a shard that is its task: it has nothing better, if that is poor."""
        return publisher == self.manifest.device and shard in self.own and shard in self.sources

    def outdone(self, shard: ShardId, holder: int) -> bool:
        """Whether what a holder has of a shard is worth more than the copy that is there, if one is."""
        if shard not in self.sources:
            return True
        stage, source = self.ancestry.stage_of(shard), self.sources[shard]
        said = self.said.get((stage, holder))
        if said is None or source == holder:
            return source not in self.live  # nobody counts on such a device: it may have built on next to nothing
        return self.ancestry.less(self.lineages[shard], said, stage)

    def unaware(self, missing: Mapping[ShardId, int]) -> set[int]:
        """Peers that may not know that this stage waits for shards of theirs, which are ``missing``: they have
        published without those, or are to stand in for others that they may not miss."""
        without = {device for device in missing.values() if (self.stage, device) in self.said}
        for (exchange, number), device in missing.items():
            shard = self.manifest.exchanges[exchange].shards[number]
            if device not in without and (device != shard.devices[0] or shard.after or shard.parity_of):
                before = shard.devices[: shard.devices.index(device)]
                if shard.after or shard.parity_of or not self.discounted.get(device, set()).issuperset(before):
                    without.add(device)
        return without - {self.manifest.device}

    def waits_long(self, now: float) -> bool:
        """Whether so much time has passed that others are asked how they are."""
        nudge_at = self.asked_at if self.nudge_at is None else self.nudge_at
        return self.phase is Phase.WAITING and now >= min(self.asked_at, nudge_at)

    def awaits(self, device: int) -> bool:
        """Whether this stage misses shards of a peer."""
        if self.straight is None:
            return device in self.missing().values()
        return (self.stage, device) in self.straight.awaited[self.stage] - self.parcels.keys()

    def asked_by(self, peer: int, shards: Iterable[ShardId]) -> None:
        """A peer asks for shards: it does not count on those that hold them and come before this device."""
        me = self.manifest.device
        for exchange, number in shards:
            devices = self.manifest.exchanges[exchange].shards[number].devices
            if me in devices:
                self.discounted.setdefault(peer, set()).update(devices[: devices.index(me)])

    def lacking_from(self) -> int:
        """The first stage whose shards a device that this frame counts on may lack. Whoever has handed over any of a
        stage had what it needed of those before."""
        entered = dict.fromkeys(self.live, 0)
        for stage, device in [(self.ancestry.stage_of(s), d) for s, d in self.sources.items()] + [*self.said]:
            if device in entered:
                entered[device] = max(entered[device], stage)
        return min((entered | {self.manifest.device: self.stage}).values())

    def awaited(self, me: int) -> list[int]:
        """Peers that this stage misses shards of."""
        return sorted(set(self.missing().values()) - {me})

    def _is_parity(self, shard: ShardId) -> bool:
        return bool(self.manifest.exchanges[shard[0]].shards[shard[1]].parity_of)

    def gather(self, stage: int, me: int, owned: tuple[ShardId, ...] = ()) -> tuple[Parcel, ...]:
        """Take what the next stage is assembled from, of sums in slices only what is ``owned``; a spare of our own
        stands in for what did not come."""
        if self.straight is not None:
            self.built.append(self.straight.lineage)
            found = [self.parcels[stage, device] for device in self.straight.due[stage]]
            for device in self.straight.due[stage]:
                if device != me:
                    del self.parcels[stage, device]
            return tuple(found)
        added_up = {(self.manifest.sums_of[e], s) for e, s in owned}
        exchanges = self.manifest.exchanges
        shards = [
            (e, s)
            for e, s in self.ancestry.shards_of[stage]
            if exchanges[e].owners is None or (e, s % len(exchanges[e].slices)) in added_up
        ]
        parcel, built = self.gathered(stage, me, shards)
        self.built.append(built)
        return (parcel,)

    def gathered(self, stage: int, me: int, shards: list[ShardId]) -> tuple[Parcel, Lineage]:
        """Take what there is of some shards of a stage, and what that is built on."""
        mine = self.built[stage]
        for shard in shards:
            if shard in self.own:
                self.offer([(shard, self.own[shard])], me, self.lineage_of(shard))
        every = {shard: self.sources[shard] for shard in shards if shard in self.got}
        poor = {shard for shard in every if self.ancestry.less(self.lineages[shard], mine, stage)}
        held = adding.without_overlaps(self, every, poor)
        poor &= held.keys()
        taken = {shard: source for shard, source in held.items() if shard not in poor}
        built = self.ancestry.after(stage, mine, self.live, taken, self.lineages, shards)
        for device in sorted({held[shard] for shard in poor}, key=lambda d: self._worst(stage, poor, held, d)):
            more = taken | {shard: device for shard in poor if held[shard] == device}
            other = self.ancestry.after(stage, mine, self.live, more, self.lineages, shards)
            if self.ancestry.worth(other, stage + 1) > self.ancestry.worth(built, stage + 1) - TOLERANCE:
                taken, built = more, other
        for shard in every.keys() - taken.keys():
            del self.sources[shard], self.got[shard]
        return Parcel(tuple(taken), [self.got.pop(shard) for shard in taken]), built

    def _worst(self, stage: int, poor: set[ShardId], held: dict[ShardId, int], device: int) -> tuple[float, int]:
        """For an order of devices by what their poor shards are worth, the best first."""
        worths = [self.ancestry.worth(self.lineages[shard], stage) for shard in poor if held[shard] == device]
        return -min(worths), device

    def pieces_due(
        self, stage: int, me: int, lacked: bool = True, own: frozenset[ShardId] = frozenset()
    ) -> tuple[int, ...]:
        """Pieces of a stage that hold a shard which is neither computed nor anybody else's task; if nobody may have
        ``lacked`` any, only those that were asked for, or that this device needs of its ``own``. Hot spares are always
        computed."""
        return tuple(
            number
            for number, piece in enumerate(self.manifest.stages[stage].pieces)
            if not self.manifest.is_owners(piece)
            and any(
                shard not in self.own
                and (self._hot or shard in self.wanted or shard in own or (lacked and self.publisher(shard) == me))
                for shard in piece.shards
            )
        )

    def owed(self, me: int) -> RunPieces | None:
        """What has to be computed of stages that were entered; nothing more once that has failed."""
        lacking_from = self.lacking_from()
        own = adding.own_sums(self, lacking_from)
        for stage in range(self.settled, 0 if self.failed else self.stage + (self.phase is not Phase.READY)):
            if pieces := self.pieces_due(stage, me, stage >= lacking_from, own):
                return RunPieces(self.id, stage, pieces, self.down)
            if owned := adding.ready(self, stage):
                return adding.take_over(self, stage, me, owned)
        self.owes = False
        return None

    def enter(self, me: int) -> RunStage:
        """What has to be computed of the next stage, which is entered."""
        stage, straight = self.stage, self.straight
        owned = adding.ready(self, stage, self.hurried is not None) if straight is None else straight.owned[stage]
        gathered = self.gather(stage - 1, me, owned) if stage else ()
        if not stage:
            self.built[0] = Lineage(tuple(sorted(self.live)))
        due = () if straight is None else straight.parcels[stage]
        if straight is None:
            pieces = (*self.pieces_due(stage, me), *adding.pieces_of(self.manifest, stage, owned))
        else:
            pieces = straight.pieces[stage]
            self._settle(straight.settled[stage])
        task = RunStage(self.id, stage, self.array, gathered, pieces, self.down, due, owned, self.settled)
        self.array, self.phase = None, Phase.COMPUTING
        return task

    def _settle(self, stage: int) -> None:
        """While straight: nobody will have to stand in for another in the stages before this one."""
        self.settled = max(self.settled, stage)
        if self.spared:
            self.spared = [of for of in self.spared if self.ancestry.stage_of(of.shards[0]) >= self.settled]

    def coverage(self) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
        """Least share of neurons present and largest share from a spare, over the exchanges, in all that the output is
        built on; and where this device had each shard from."""
        shares = self.ancestry.shares(self.built[-1], len(self.built) - 1)
        if self.straight is not None:
            return min(shares.present, default=1.0), max(shares.spares, default=0.0), self.straight.had
        sources = tuple(self.ancestry.row(e, self.sources) for e in range(len(self.manifest.exchanges)))
        return min(shares.present, default=1.0), max(shares.spares, default=0.0), sources
