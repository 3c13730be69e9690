"""What the source knows across sockets: subscriptions, continuity, canaries, what waits to be taken.

It does no I/O: a session reports to it, the source reads from it. Every gap and every change enters the
buffer here, in one order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import msgspec
import structlog

from worker.change import RawChange
from worker.realtime.buffer import Buffer
from worker.realtime.canary import Canary, Return, Written
from worker.realtime.connection import tables_in_words
from worker.realtime.continuity import Continuity
from worker.realtime.frames import ChangeFrame, MalformedFrame
from worker.realtime.subscription import Lost, Stage, Subscribed, Subscriptions, TableName
from worker.realtime.timing import Timing
from worker.source import Gap

log = structlog.get_logger(__name__)

# Errors with which Realtime announces a change and leaves out the row. "Error 413" leaves out single values
# only.
_WITHHELD = ("Error 400", "Error 401")


@dataclass
class Counts:
    """What has happened since the process started; numbers only grow."""

    connections: int = 0
    changes: int = 0
    foreign: int = 0
    """Changes of tables nobody asked for, which Realtime's matching of names brought along."""
    withheld: int = 0
    malformed: int = 0
    gaps: int = 0
    canaries: int = 0


class _Withheld(NamedTuple):
    due: float
    """Not before this reading of the clock is the next gap due."""
    pending: list[Gap]


class Ledger:
    """Account of all that was subscribed, received and lost.

    Args:
        tables: what to read.
        canary: the canary's table.
        buffer: where changes and gaps go.
        timing: the waits.
        now: the wall clock, aware.
        doorbell: nothing depends on what is received: nothing lost is a gap, and canaries are passed on.
    """

    def __init__(
        self,
        tables: Sequence[TableName],
        canary: TableName,
        buffer: Buffer,
        timing: Timing,
        now: Callable[[], datetime],
        *,
        doorbell: bool = False,
    ) -> None:
        self.subscriptions = Subscriptions(tables, canary, timing)
        self.continuity = Continuity([table for table in tables if table != canary])
        self.canary = Canary()
        self.buffer = buffer
        self.now = now
        self.counts = Counts()
        self.is_connected = False
        self.worked = False
        """Whether the last socket did what a socket is for, before it ended."""
        self.refusals: dict[TableName, tuple[str, float]] = {}
        """Tables of which a change was withheld, with Realtime's error and the clock's reading."""
        self._doorbell = doorbell
        self._canary_table = canary
        self._timing = timing
        self._withheld: dict[tuple[tuple[TableName, ...], str], _Withheld] = {}
        self._unproven = ""
        self._reported: dict[str, str] = {}
        self._was_complete = False

    def connected(self, clock: float) -> None:
        """A socket is open; nothing is subscribed on it yet."""
        self.is_connected, self._was_complete = True, False
        self.counts.connections += 1
        self.canary.reset()
        self.subscriptions.begin(clock)

    def disconnected(self, cause: str) -> None:
        """The socket is gone, and with it every subscription."""
        self.is_connected = False
        # Subscribed alone is not enough where a canary could have shown that it carries nothing.
        proven = self.canary.last is not None or self.subscriptions.canary.stage is not Stage.SUBSCRIBED
        self.worked = self._was_complete and proven
        self.subscriptions.end()
        self.canary.reset()
        self.continuity.lost(self._all(), cause)

    def note(self, outcome: Subscribed | Lost) -> None:
        """Take in that tables are subscribed or lost."""
        if isinstance(outcome, Lost):
            log.warning("subscription lost", tables=tables_in_words(outcome.tables), cause=outcome.cause)
            self.continuity.lost(outcome.tables, outcome.cause)
        elif outcome.again:
            cause = "Realtime made the subscription anew: its publication or the token changed"
            self._put(self.continuity.doubtful(outcome.tables, self.now(), cause))
        else:
            self._put(self.continuity.subscribed(outcome.tables, self.now()))

    def report(self) -> None:
        """Log what has changed about the subscriptions since the last call: states, not attempts."""
        subscriptions = self.subscriptions
        troubles = {channel.topic: channel for channel in [*subscriptions.channels, subscriptions.canary]}
        for topic, channel in troubles.items():
            if channel.trouble and self._reported.get(topic) != channel.trouble:
                tables = tables_in_words(channel.tables)
                log.warning("cannot subscribe, trying on", tables=tables, cause=channel.trouble)
            self._reported[topic] = channel.trouble
        if subscriptions.complete and not self._was_complete:
            self._was_complete = True
            log.info("subscribed", tables=len(self._all()), channels=len(subscriptions.channels))

    def change(self, frame: ChangeFrame, clock: float) -> None:
        """Take in a change: pass it on, or account for why not."""
        change = frame.change
        table = (change.schema, change.table)
        if not self.subscriptions.concerns(frame.topic, table):
            self.counts.foreign += 1
            return
        if change.errors:
            for error in change.errors:
                if error.startswith(_WITHHELD):
                    self._refused(table, error, clock)
                    return
        elif self.refusals and change.type != "DELETE":
            self.refusals.pop(table, None)
        if table == self._canary_table:
            token = _token(change)
            returned = self.canary.seen(token, clock) if token is not None else None
            if returned is not None:
                self._canary_back(returned)
            if self._doorbell:
                self.buffer.put(change)
            return
        self.counts.changes += 1
        self.buffer.put(change)

    def malformed(self, error: MalformedFrame, size: int, clock: float) -> None:
        """A frame could not be read. It may have been a change, so its tables have a gap."""
        self.counts.malformed += 1
        self._withhold(
            self.subscriptions.tables_of(error.topic), f"a malformed frame: {error.reason}", clock, size=size
        )

    def tick(self, clock: float) -> None:
        """Let time pass: put the gaps that were held back to join them."""
        for key, (due, pending) in list(self._withheld.items()):
            if clock >= due:
                if pending:
                    self._put([gap._replace(until=self.now()) for gap in pending])
                    self._withheld[key] = _Withheld(clock + self._timing.withheld, [])
                else:
                    del self._withheld[key]

    def canary_written(self, token: str, written: Written) -> None:
        """A canary is on its way."""
        self.canary.write_trouble = ""
        returned = self.canary.written(token, written)
        if returned is not None:
            self._canary_back(returned)

    def canary_failed(self, kind: str) -> None:
        """A canary could not be written: the database may be away, and Realtime's temporary slot with it."""
        if not self.canary.write_trouble:
            log.warning("cannot write the canary row", error=kind)
        self.canary.write_trouble = kind
        self.doubt("the database was away: Realtime's temporary slot may have been lost")

    def doubt(self, cause: str) -> None:
        """Something may have been lost since the last proof: the next canary that comes back ends the gap."""
        self._unproven = self._unproven or cause

    def _canary_back(self, returned: Return) -> None:
        self.counts.canaries += 1
        cause = "Realtime dropped changes: a canary did not come back, a later one did"
        doubt = self._unproven or (cause if returned.overtook else "")
        if doubt:
            self._put(self.continuity.doubtful(self._all(), self.now(), doubt))
        self._unproven = ""
        self.continuity.prove(returned.moment)

    def _refused(self, table: TableName, error: str, clock: float) -> None:
        self.counts.withheld += 1
        self.refusals[table] = error, clock
        if table == self._canary_table:
            # Which canary it is does not show, but the path carries: replacing the socket would help nobody.
            self.canary.excuse()
        self._withhold((table,), f"Realtime withheld a change: {error}", clock)

    def _withhold(self, tables: tuple[TableName, ...], cause: str, clock: float, **details: int) -> None:
        known = self._withheld.get((tables, cause))
        if known is None:
            words = tables_in_words(tables)
            if self._doorbell:
                log.warning("change not sent by Realtime", tables=words, cause=cause, **details)
            else:
                log.warning("change lost", tables=words, cause=cause, **details)
            self._put(self.continuity.doubtful(tables, self.now(), cause))
            self._withheld[tables, cause] = _Withheld(clock + self._timing.withheld, [])
        elif not known.pending:
            # A thousand of them must not make a thousand gaps, each with its backfill. The beginning is
            # fixed now: a canary that comes back meanwhile must not move it past the change.
            known.pending.extend(self.continuity.doubtful(tables, self.now(), cause))

    def _put(self, gaps: list[Gap]) -> None:
        if self._doorbell:
            return
        self.counts.gaps += len(gaps)
        for gap in gaps:
            log.warning(
                "possible gap",
                since=None if gap.since is None else gap.since.isoformat(),
                cause=gap.cause,
                tables=tables_in_words(gap.tables),
            )
            self.buffer.put_gap(gap)

    def _all(self) -> tuple[TableName, ...]:
        return tuple(table for channel in self.subscriptions.channels for table in channel.tables)


def _token(change: RawChange) -> str | None:
    raw = (change.record or {}).get("token")
    try:
        return None if raw is None else str(msgspec.json.decode(raw))
    except msgspec.DecodeError:
        return None
