"""What a source of changes looks like to the listener.

Each delivery has one source: Realtime's payloads in plain delivery, the write-ahead log in proven delivery.
Both end here. A source knows nothing of handlers, lanes or Redis.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from worker.change import RawChange


class Gap(NamedTuple):
    """An interval in which changes of some tables may have been lost."""

    since: datetime | None
    """Last moment at which the source was surely live; None when nobody knows."""
    until: datetime
    cause: str
    tables: tuple[tuple[str, str], ...]
    """(schema, table) pairs."""


class SourceHealth(NamedTuple):
    """What readiness and status need to know of a source."""

    ready: bool
    """True while every commit from now on will be delivered."""
    reasons: tuple[str, ...]
    """Why not, in words, with the remedy; empty when ready."""
    connected: bool
    subscribed: bool
    canary_seconds: float | None
    """Age in seconds of the last canary that came back; None before the first."""
    lag_seconds: float | None
    """Seconds from writing the last canary to its return, or since then while it is out; None at first."""
    connections: int = 0
    """That have been opened so far."""


class Source(Protocol):
    """Yields changes and gaps in the order in which they happened."""

    def read(self) -> AsyncIterator[Sequence[RawChange | Gap]]:
        """Yield all that has arrived since the last batch (bounded, never empty).

        Ends only when closed or cancelled: a source survives whatever its server does.
        """
        ...

    def health(self) -> SourceHealth:
        """Tell the state of this moment, without I/O."""
        ...


class PlainSource(Source, Protocol):
    """A source of plain delivery, which cannot be read again: how far it is sure of what it has given."""

    @property
    def subscribed_since(self) -> datetime | None:
        """Since when everything arrives; None before."""
        ...

    @property
    def sure_until(self) -> datetime | None:
        """Up to when everything that was committed has arrived."""
        ...

    @property
    def waiting(self) -> int:
        """Changes that have arrived and were not handed over yet."""
        ...

    def doubt(self, reason: str) -> None:
        """Be told that changes may have been lost on the server's side."""
        ...


class RereadError(Exception):
    """The source must be read again from where it stands, under a new generation; the lease is kept.

    Attributes:
        seconds: to wait before.
    """

    def __init__(self, cause: str, seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.seconds = seconds
