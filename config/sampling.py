"""Keeps what repeats itself from filling the log: of the same complaint so many lines a minute.

For warnings and errors, ours and the libraries'. What is left out is counted, and the next line that gets
through says how many lines it were. What operators count by (held changes, failures by class) is elsewhere,
and whole.
"""

import logging
import time
from typing import Final

BURST: Final = 20
"""Lines of the same complaint within SECONDS."""
SECONDS: Final = 60.0
MOST_KNOWN: Final = 1_000
_now = time.monotonic
_SAME: Final = ("event", "handler", "table", "cause", "reason", "error_class", "exc_info")
"""Fields by which two lines of ours are the same complaint; the position and the lane are not among them."""


class Sampling(logging.Filter):
    """A filter of a log's handler."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[object, ...], tuple[float, int]] = {}
        """Since when a complaint is counted, and how many lines of it there were."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is written; one that follows on many that were not says so."""
        if record.levelno < logging.WARNING:
            return True
        now, key = _now(), _complaint(record)
        since, count = self._known.get(key, (now, 0))
        left_out = 0
        if now - since >= SECONDS:
            since, count, left_out = now, 0, max(0, count - BURST)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = (since, count + 1)
        if count >= BURST:
            return False
        if left_out:
            _say(record, left_out)
        return True


def _complaint(record: logging.LogRecord) -> tuple[object, ...]:
    if isinstance(record.msg, dict):  # structlog's event, before it is rendered
        return (record.name, record.levelno, *(_known_by(record.msg.get(name)) for name in _SAME))
    return (record.name, record.levelno, record.msg if isinstance(record.msg, str) else type(record.msg))


def _known_by(value: object) -> object:
    """Give of an exception its class, for its text may differ each time."""
    if isinstance(value, tuple) and value:
        return value[0]
    return type(value) if isinstance(value, BaseException) else str(value)


def _say(record: logging.LogRecord, left_out: int) -> None:
    if isinstance(record.msg, dict):
        record.msg = record.msg | {"left_out": left_out}
    else:
        record.left_out = left_out  # as `extra=` would: the formatter takes it up
