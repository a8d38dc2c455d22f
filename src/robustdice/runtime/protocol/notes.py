"""What a device says in its log about its peers and its frames."""

from __future__ import annotations

from robustdice.runtime.protocol.events import Note


def admitted(device: int, frame: int) -> Note:
    """A peer takes part from a frame on."""
    return Note(f"device {device} takes part from frame {frame} on", "admitted", device, frame)


def suspect(device: int, frame: int | None, reason: str) -> Note:
    """Nobody waits for a peer any longer; ``frame`` did in vain."""
    return Note(f"device {device} is suspect: {reason}", "suspect", device, frame, reason)


def late(device: int, frame: int) -> Note:
    """A frame goes on without a peer that is well."""
    reason = "its shards are still on their way"
    return Note(f"frame {frame} goes on without device {device}: {reason}", "late", device, frame, reason)


def poor(device: int, frame: int, stage: int) -> Note:
    """A peer that takes part has gone on with less than this device has."""
    reason = f"it has built stage {stage} on less than this device"
    text = f"frame {frame} takes from device {device} only what nobody else has: {reason}"
    return Note(text, "poor", device, frame, reason)


def failed(frame: int, stage: int, error: str) -> Note:
    """A frame could not be computed."""
    return Note(f"frame {frame} failed in stage {stage}: {error}", "failed", frame=frame, reason=error)


def one_way(device: int, reason: str) -> Note:
    """A peer hears this device and is not heard, or the reverse."""
    text = f"device {device} is connected one way only and takes no part: {reason}"
    return Note(text, "one-way", device, reason=reason)


def both_ways(device: int) -> Note:
    """It was connected one way only."""
    return Note(f"device {device} is connected both ways again", "both-ways", device)
