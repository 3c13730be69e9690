"""Traces for OpenTelemetry: one for a change, from its commit to the commit of what was derived from it.

An extra, and off unless `WORKER_TRACES` says otherwise: then nobody has a `Traces`, and nothing is imported.
Which trace a change belongs to, and whether it is one of those that are sampled, is worked out from its
position, by listener and workers alike: no entry carries anything for it.
"""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from config.settings import Settings
from worker.errors import ConfigurationError
from worker.raw import Position

if TYPE_CHECKING:
    from worker.tracing.spans import Traces

CLOSE_SECONDS: Final = 2.0
"""How long the end of a process waits for what is not sent yet; a collector that is away holds up nobody."""
_ALL: Final = 1 << 64
_LAST: Final = _ALL - 1
_ODD: Final = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Multipliers that spread neighbours over all numbers of 64 bits."""


class Ids(NamedTuple):
    """The trace of a change and the span that all others of it belong to."""

    trace: int
    span: int


class Choice:
    """Which changes are traced, and under which ids.

    Args:
        share: of the changes, from 0 to 1.
        name: of the Tailrace, as its queue is called: positions of another one may be the same.
    """

    def __init__(self, share: float, name: str) -> None:
        self._bound = int(share * _ALL)
        self._name = name

    def takes(self, position: Position) -> bool:
        """Tell whether a change is traced. Asked of each, so it does no more than mix two numbers."""
        mixed = (position.lsn * _ODD[0] + position.ordinal * _ODD[1]) & _LAST
        mixed = (mixed ^ mixed >> 31) * _ODD[2] & _LAST
        return mixed ^ mixed >> 29 < self._bound

    def ids(self, position: Position) -> Ids | None:
        """Work out the ids of a change; None where it is not traced."""
        if not self.takes(position):
            return None
        found = hashlib.blake2b(f"{self._name} {position}".encode(), digest_size=24).digest()
        return Ids(int.from_bytes(found[:16]), int.from_bytes(found[16:]))


@asynccontextmanager
async def traces_of(settings: Settings, process: str) -> "AsyncIterator[Traces | None]":
    """Give what traces are made with in this process; None where there are to be none.

    Raises:
        ConfigurationError: they are wanted, and OpenTelemetry is not installed.
    """
    if settings.traces == 0:
        yield None
        return
    try:
        from worker.tracing.spans import Traces, exporting  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        needed = "WORKER_TRACES needs OpenTelemetry: pip install '../tailrace[otel]', which is your checkout"
        raise ConfigurationError([needed]) from None
    provider = exporting(settings.traces_endpoint, f"tailrace-{process}")
    try:
        yield Traces(provider, Choice(settings.traces, settings.queue))
    finally:
        # In a thread that nobody has to wait for: what is left is sent, if the collector takes it.
        closing = threading.Thread(target=provider.shutdown, name="tracing: shutdown", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_SECONDS)
