"""Realtime in proven delivery: it rings, and what it sends is compared with the log. Nothing depends on it.

Canaries are written here, whether Realtime is there or not: each must come back by both ways, which tells how
late either is.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import msgspec

from worker import lease
from worker.change import RawChange
from worker.database import is_away
from worker.reading.crosscheck import milliseconds
from worker.reading.ground import CANARY, Ground
from worker.source import Gap, SourceHealth

_REMEMBERED = 1000
"""Canaries that may be on their way through Realtime, which may never show them."""


class Doorbell:
    """Realtime for one reading of the log.

    Args:
        ground: where everything stands.
        ring: called when there may be something to read.
    """

    def __init__(self, ground: Ground, ring: Callable[[], None]) -> None:
        self._ground = ground
        self._ring = ring
        self._check = ground.crosscheck
        self._check.begin()
        self._source = ground.realtime(self.write_canary, doorbell=True)
        self._one_writer = asyncio.Lock()
        self._wrote = 0.0
        self._unread: OrderedDict[str, float] = OrderedDict()
        self._written: OrderedDict[str, datetime] = OrderedDict()
        self._lag: float | None = None

    async def run(self) -> None:
        """Listen and write canaries for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear(), name="listener: realtime")
            group.create_task(self._beat(), name="listener: canary")

    async def write_canary(self) -> str:
        """Write a canary; returns its token."""
        async with self._one_writer:
            token = lease.new_name()
            self._wrote = time.monotonic()
            self._unread[token] = self._wrote
            self._written[token] = datetime.now(UTC)
            if len(self._written) > _REMEMBERED:
                self._written.popitem(last=False)
            try:
                await self._ground.write_canary(token)
            except BaseException:
                self._unread.pop(token, None)
                raise
            return token

    async def _beat(self) -> None:
        """Write the canaries that Realtime's session does not write, while it has no subscription."""
        seconds = self._ground.settings.canary_seconds
        while True:
            await asyncio.sleep(max(0.0, self._wrote + seconds * 1.25 - time.monotonic()))
            if time.monotonic() - self._wrote < seconds:
                continue
            try:
                await self.write_canary()
            except Exception as error:
                if not is_away(error):
                    raise

    async def _hear(self) -> None:
        async with aclosing(self._source.read()) as batches:  # type: ignore[type-var] # it is an async generator
            async for batch in batches:
                self._ring()
                for one in batch:
                    if isinstance(one, Gap):
                        continue
                    if (one.schema, one.table) == CANARY:
                        self._canary_heard(one)
                    else:
                        self._check.heard(one)

    def _canary_heard(self, canary: RawChange) -> None:
        written = self._written.get(_token(canary))
        if written is None or canary.commit_timestamp is None:
            return
        moment = milliseconds(canary.commit_timestamp)
        self._check.realtime_passed(moment)
        for table, since in self._source.first_subscribed.items():
            if since <= written and not self._check.is_expected(table):
                known = self._ground.catalogue.tables.get(table)
                self._check.expect(table, known.primary_key if known else (), moment)

    # The log's side

    def logged(self, change: RawChange) -> None:
        """Take in a change of the log, canaries too."""
        if (change.schema, change.table) != CANARY:
            self._check.logged(change)
            return
        if change.commit_timestamp is not None:
            self._check.log_passed(milliseconds(change.commit_timestamp))
        token = _token(change)
        while token in self._unread:
            name, written = self._unread.popitem(last=False)
            if name == token:
                self._lag = time.monotonic() - written

    # Telling

    def log_lag(self) -> float | None:
        """Tell how late the log is: the last canary's time from being written to being read, in seconds.

        One that is out for longer than that counts for so long as it has been out.
        """
        waiting = time.monotonic() - next(iter(self._unread.values())) if self._unread else 0.0
        return None if self._lag is None and not self._unread else max(self._lag or 0.0, waiting)

    def health(self) -> SourceHealth:
        """Tell the state of Realtime."""
        return self._source.health()

    def compared(self) -> tuple[int, int]:
        """Count what Realtime left out, and what it sent besides."""
        return self._check.missed, self._check.extra

    def notes(self) -> list[str]:
        """Tell what is wrong with Realtime: no reason to be unready."""
        return [f"Realtime, which only rings: {reason}" for reason in self.health().reasons]


def _token(change: RawChange) -> str:
    """Read a canary's token, as Realtime or as the log writes it; empty if it is none."""
    raw: Any = (change.record or {}).get("token")
    try:
        text = bytes(raw) if isinstance(raw, (bytes, msgspec.Raw)) else b""
        return str(msgspec.json.decode(text)) if text[:1] == b'"' else text.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
