"""The device side's log: a sentence for people, and what happened as fields for programs."""

from __future__ import annotations

import json
import logging

FIELDS = ("event", "device", "peer", "frame", "reason")
"""What a record may say besides its sentence; docs/formats.md lists the events."""


def say(
    log: logging.Logger,
    text: str,
    *,
    event: str,
    device: int | None = None,
    peer: int | None = None,
    frame: int | None = None,
    reason: str | None = None,
    level: int = logging.INFO,
) -> None:
    """Log ``text``. ``device`` is who speaks and ``peer`` whom it speaks of (their numbers), ``frame`` a frame's."""
    fields = dict(zip(FIELDS, (event, device, peer, frame, reason), strict=True))
    log.log(level, "%s", text, extra={"fields": fields}, stacklevel=2)


class JsonLines(logging.Formatter):
    """Log records as JSON objects, one a line, all with the same keys; what a record does not say is null."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, without a line break."""
        document = {"time": record.created, "level": record.levelname, "message": record.getMessage()}
        document |= getattr(record, "fields", dict.fromkeys(FIELDS))
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)
