"""Which partial sums are added up when some of those that came have neurons in common."""

from __future__ import annotations

from bundles import make_manifest, make_plan
from robustdice.runtime.protocol.sums import Sums

MANIFEST = make_manifest(make_plan(3, holders=3, pair=True), 0)
SUMS, SHARDS = Sums(MANIFEST), MANIFEST.exchanges[0].shards


def test_only_a_pairs_exchange_has_sums() -> None:
    assert 0 in SUMS
    assert 1 not in SUMS


def test_those_that_wait_for_the_same_devices_have_no_neuron_in_common() -> None:
    for after in {shard.after for shard in SHARDS}:
        same = [number for number, shard in enumerate(SHARDS) if shard.after == after]
        assert SUMS.apart(0, same) == same


def test_of_those_that_overlap_the_first_is_taken() -> None:
    everything = SUMS.neurons(0, range(len(SHARDS)))
    assert everything == 2**8 - 1
    first = SUMS.apart(0, range(len(SHARDS)))
    assert all(not SHARDS[number].after for number in first)  # what is published while all are up
    assert SUMS.neurons(0, first) == everything
    last = SUMS.apart(0, reversed(range(len(SHARDS))))
    assert SHARDS[last[0]].after == SHARDS[-1].after != ()
    taken = [neuron for number in last for neuron in SHARDS[number].neurons]
    assert len(taken) == len(set(taken))
