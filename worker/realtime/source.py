"""The Realtime source: changes and gaps of the subscribed tables, whatever the server does.

The outer loop here only survives: it starts session after session, waits between them, never gives up, and
speaks when something has changed, not at each attempt. The inner one, which works, is `session`. What
Realtime loses in silence between two canaries that come back cannot be seen here; nothing that can be seen
is left unsaid.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime

import structlog

from worker.change import RawChange
from worker.realtime.buffer import Buffer
from worker.realtime.connection import Address, CannotConnect, tables_in_words
from worker.realtime.ledger import Counts, Ledger
from worker.realtime.session import Session, SessionOver
from worker.realtime.subscription import Channel, Stage, TableName
from worker.realtime.timing import Timing, backoff
from worker.source import Gap, SourceHealth

log = structlog.get_logger(__name__)

CANARY_TABLE = ("tailrace", "canary")
_REFUSAL_FRESH = 300.0
"""Seconds for which a withheld change keeps us from being ready, unless a good one of its table comes."""


class RealtimeSource:
    """Yields what Realtime sends for some tables. Implements `worker.source.Source`.

    Args:
        url: Realtime's address: `wss://<project>.supabase.co/realtime/v1`, or `ws://host:port/socket`.
        key: the service key.
        tables: (schema, table) pairs to subscribe to.
        write_canary: writes a row of `tailrace.canary`, commits, returns what it wrote into `token`.
        canary_seconds: time between two canaries, in seconds.
        publication: named in advice only.
        timing: all other waits.
        buffer: bounds what is read ahead of the consumer.
        doorbell: what is sent only rings: there are no gaps, and canaries are yielded with the changes.

    Raises:
        ValueError: the address is none.
    """

    def __init__(  # noqa: PLR0913 - what a source is told, once
        self,
        url: str,
        key: str,
        tables: Sequence[TableName],
        write_canary: Callable[[], Awaitable[str]],
        *,
        canary_seconds: float = 5.0,
        publication: str = "supabase_realtime",
        timing: Timing | None = None,
        buffer: Buffer | None = None,
        doorbell: bool = False,
    ) -> None:
        self._timing = timing or Timing()
        self._address = Address(url, key)
        self._write_canary, self._canary_seconds = write_canary, canary_seconds
        self._publication = publication
        self._ledger = Ledger(tables, CANARY_TABLE, buffer or Buffer(), self._timing, _now, doorbell=doorbell)
        self._survivor: asyncio.Task[None] | None = None
        self._trouble = f"connecting to Realtime at {self._address.words}"

    @property
    def counts(self) -> Counts:
        """What has happened so far, for metrics."""
        return self._ledger.counts

    @property
    def waiting(self) -> int:
        """Changes and gaps that have been received and not yet been taken from `read`."""
        return len(self._ledger.buffer)

    @property
    def subscribed_since(self) -> datetime | None:
        """The moment from which every table is subscribed without a break; None while one is not."""
        return self._ledger.continuity.subscribed_since

    @property
    def first_subscribed(self) -> dict[TableName, datetime]:
        """When each table was subscribed for the first time. For what was before, no gap is yielded."""
        return self._ledger.continuity.first_subscribed

    @property
    def sure_until(self) -> datetime | None:
        """Up to when all changes have been received.

        As far as can be known; worth remembering for a restart. None before every table was subscribed.
        """
        return self._ledger.continuity.sure_until

    def doubt(self, cause: str) -> None:
        """Say that Realtime may have lost changes up to now, though it looks well; becomes a gap.

        For who sees what this source cannot: another backend at Realtime's slot, a restarted database.
        """
        self._ledger.doubt(cause)

    async def read(self) -> AsyncIterator[Sequence[RawChange | Gap]]:
        """Yield all that has arrived since the last batch: changes, and gaps where they belong.

        Ends only when closed or cancelled, and then closes the connection. What was not taken by then is
        kept for the next call. Use `contextlib.aclosing` where the loop over it may be left early.

        Raises:
            RuntimeError: it is being read already.
        """
        if self._survivor is not None:
            raise RuntimeError("a RealtimeSource can be read by one reader at a time")
        buffer = self._ledger.buffer
        survivor = self._survivor = asyncio.create_task(self._survive(), name="realtime: survive")
        survivor.add_done_callback(lambda _: buffer.wake())
        try:
            while True:
                batch = buffer.take()
                if batch:
                    yield batch
                    continue
                await buffer.filled()
                if survivor.done():
                    # Only a fault in the loop that survives all others gets here; it must not look like
                    # quiet.
                    survivor.result()
                    raise RuntimeError("the Realtime source has ended")
        finally:
            survivor.cancel()
            await asyncio.wait({survivor})
            self._survivor = None

    async def _survive(self) -> None:
        failures = 0
        while True:
            refused = False
            ledger = self._ledger
            try:
                session = Session(
                    self._address, ledger, self._write_canary, self._canary_seconds, self._timing
                )
                await session.run()
            except CannotConnect as error:
                trouble, refused, worked = error.reason, error.refused, False
            except SessionOver as over:
                trouble, worked = over.cause, ledger.worked
            except Exception as error:
                log.exception("unexpected error in the Realtime source")
                trouble, worked = f"unexpected error ({type(error).__name__}): see the log", False
            # A socket that worked and went is news; the tenth failure in a row is not.
            if worked or trouble != self._trouble:
                log.warning("no connection to Realtime, trying on", cause=trouble)
            self._trouble = trouble
            failures = 1 if worked else failures + 1
            timing = self._timing
            first, most = (
                (timing.refused, timing.refused_max) if refused else (timing.reconnect, timing.reconnect_max)
            )
            await asyncio.sleep(backoff(first, most, failures))

    def health(self) -> SourceHealth:
        """Tell the state of this moment, without I/O."""
        ledger = self._ledger
        last = ledger.canary.last
        reasons = tuple(self._reasons())
        return SourceHealth(
            ready=not reasons,
            reasons=reasons,
            connected=ledger.is_connected,
            subscribed=ledger.is_connected and ledger.subscriptions.complete,
            canary_seconds=None if last is None else time.monotonic() - last.clock,
            lag_seconds=self._lag(),
            connections=ledger.counts.connections,
        )

    def _reasons(self) -> list[str]:
        ledger, subscriptions = self._ledger, self._ledger.subscriptions
        if self._survivor is None:
            return ["Realtime is not being read"]
        if not ledger.is_connected:
            return [self._trouble]
        waiting = [
            c for c in [*subscriptions.channels, subscriptions.canary] if c.stage is not Stage.SUBSCRIBED
        ]
        reasons = [self._why_not_subscribed(channel) for channel in waiting]
        reasons += [
            _advice_on_refusal(table, error)
            for table, (error, clock) in ledger.refusals.items()
            if time.monotonic() - clock < _REFUSAL_FRESH
        ]
        if ledger.canary.write_trouble:
            reasons.append(
                f"the canary row cannot be written ({ledger.canary.write_trouble}):"
                " is the database reachable, and has `python -m worker migrate` been run?"
            )
        elif subscriptions.canary.stage is Stage.SUBSCRIBED:
            last = ledger.canary.last
            if last is None:
                reasons.append("no canary has come back through Realtime yet")
            elif time.monotonic() - last.clock > self._canary_seconds + self._timing.canary:
                reasons.append(f"the last canary came back {time.monotonic() - last.clock:.0f} s ago")
        return reasons

    def _why_not_subscribed(self, channel: Channel) -> str:
        tables = tables_in_words(channel.tables)
        if not channel.trouble:
            return f"waiting for Realtime to subscribe {tables}"
        if "Please check Realtime is enabled" in channel.trouble:
            add = ", ".join(f'"{schema}"."{table}"' for schema, table in channel.tables[:5])
            return (
                f"Realtime does not serve {tables} (missing, not in the publication, or not to be read):"
                f" alter publication {self._publication} add table {add};"
                f" grant select on {add} to service_role"
            )
        return f"Realtime does not subscribe {tables}: {channel.trouble[:300]}"

    def _lag(self) -> float | None:
        """Tell how late Realtime is; a canary that is still out counts for as long as it is out."""
        canary, now = self._ledger.canary, time.monotonic()
        waiting = canary.waiting(now, 0.0)
        return max(canary.lag_seconds or 0.0, waiting) if waiting or canary.lag_seconds is not None else None


def _now() -> datetime:
    return datetime.now(UTC)


def _advice_on_refusal(table: TableName, error: str) -> str:
    name = f'"{table[0]}"."{table[1]}"'
    if error.startswith("Error 401"):
        return (
            f"Realtime may not read {table[0]}.{table[1]} ({error}):"
            f' grant usage on schema "{table[0]}" to service_role; grant select on {name} to service_role'
        )
    return f"Realtime withholds the changes of {table[0]}.{table[1]} ({error}): give the table a primary key"
