"""Reading the log by SQL functions, over the ordinary pool: works wherever SQL does, poolers included.

A window is all that was flushed when it began, up to a size: its end is asked for in a statement of its own,
before anything is read, because a commit that was not flushed then is not in what is read, whatever its LSN.
Within it a cursor on the server gives portions, and is kept open while the caller is busy: the functions know
no bound of their own that holds (they give whole transactions, however large). Where so little log is to be
decoded that one portion will do, which is nearly always, one statement takes the place of the cursor.

The functions decode from where the slot stands, each time. What was handed over already is passed over; the
less often the slot moves, the more is decoded twice. A pause as long as the last look took bounds that.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.catalogue import quote
from worker.change import Position
from worker.database import singly
from worker.wal.failures import ReadingLostError, WalError, failure
from worker.wal.slot import advance_slot, as_text
from worker.wal.transactions import CANARY, Assembler, WalBatch
from worker.wal.type_names import TypeNames
from worker.wal.walsender import TEXT_FORM

_WINDOW_BYTES: Final = 64 << 20
"""Log read at one look, at most; doubled while nothing is found, until a large transaction fits."""
_BATCH_CHANGES: Final = 1000
_BATCH_BYTES: Final = 4 << 20
_DECODED_AGAIN_BYTES: Final = 4 << 20
"""From so much log on that each look decodes before it comes to what is new, a snapshot is asked for."""
_SNAPSHOT_SECONDS: Final = 1.0
_BRIEF_BYTES: Final = 256 << 10
"""Log to decode at one look, up to which one statement is tried."""
_PORTION_BYTES: Final = 2 << 20
_PORTION_ROWS: Final = 512
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0
"""Between looks; the longest comes after five quiet seconds. Realtime's bell cuts it short."""
_GROWTH: Final = 1.25

_FLUSHED: Final = text(
    "select pg_catalog.pg_current_wal_flush_lsn() as flushed, confirmed_flush_lsn as confirmed,"
    " restart_lsn as restart"
    " from (select) as one left join pg_catalog.pg_replication_slots on slot_name = :slot"
)
# Decoding starts at a recorded snapshot. The server records one every 15 s, or when asked (from PostgreSQL 16
# on, by those who may).
_SNAPSHOT: Final = text("select pg_catalog.pg_log_standby_snapshot()")
_SET: Final = [f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in TEXT_FORM.items()]
_SETTINGS: Final = text(f"select {', '.join(_SET)}")
# `fits` counts the rows after this one that make up a portion, so that one fetch asks for no more than memory
# should hold: rows of a megabyte may follow rows of ten bytes. The cursor is one of SQL, not of the driver,
# which would fetch ahead; it takes no parameters.
_DECLARE: Final = """
    declare tailrace_log no scroll cursor for
    select data, count(*) over (order by size range between current row and {portion} following) - 1 as fits
    from (
        select data, sum(pg_catalog.length(data) + 1) over (rows unbounded preceding) as size
        from pg_catalog.pg_logical_slot_peek_binary_changes(
            {slot}, '{upto}', null, 'proto_version', '1', 'publication_names', {publication},
            'messages', 'true')
    ) as sized
    """
# All of a brief window, and how many messages it has: if not all are given, they are too large for it. The
# settings come first because the function's argument is one of them, and end with the statement.
_BRIEF: Final = text(
    f"""
    with settings as materialized (
        select cast(:slot as name) as slot, {", ".join(_SET)}
    )
    select data, found from (
        select data, pg_catalog.count(*) over () as found, pg_catalog.row_number() over () as number,
               pg_catalog.sum(pg_catalog.length(data) + 1) over (rows unbounded preceding) as size
        from settings, lateral pg_catalog.pg_logical_slot_peek_binary_changes(
            settings.slot, cast(:upto as pg_catalog.pg_lsn), null,
            'proto_version', '1', 'publication_names', cast(:publication as text),
            'messages', 'true')
    ) as sized
    where size <= {_PORTION_BYTES} or number = 1
    """  # noqa: S608 - constants of ours
)


class WindowReader:
    """One reading of the log over an engine.

    Args:
        engine: lends one connection while a window is read, and another to move the slot.
        slot: name of the slot, which exists.
        publication: name of the publication.
        names: of types.
    """

    def __init__(self, engine: AsyncEngine, *, slot: str, publication: str, names: TypeNames) -> None:
        self._engine = engine
        self._slot = slot
        self._publication = publication
        self._names = names
        self._read_to = 0
        self._last: Position | None = None
        self._handed = 0
        self._window = _WINDOW_BYTES
        self._bell = asyncio.Event()
        self._closed = False
        self._next_snapshot = 0.0
        self._slot_free = (
            asyncio.Lock()
        )  # one session at a time may use the slot: we do not stand in our own way

    async def read(self) -> AsyncIterator[WalBatch]:
        """Yield batches, looking again after a pause that grows while nothing happens.

        After a failure it may be called again: it goes on behind what was handed over, in the midst of a
        transaction too, at the price of decoding again.

        Raises:
            WalError: the slot or the database is away.
            MalformedChange: what came is not the protocol.
        """
        pause = _SHORTEST_PAUSE
        seen = 0
        while not self._closed:
            began = time.monotonic()
            flushed, confirmed, restart = await self._stand()
            if confirmed - restart > _DECODED_AGAIN_BYTES:
                await self._record_snapshot()
            self._read_to = self._read_to or confirmed
            found = busy = False
            if flushed > max(seen, self._read_to):
                upto = min(flushed, self._read_to + self._window)
                async for batch in self._look(upto, brief=upto - confirmed <= _BRIEF_BYTES):
                    found = found or bool(batch.changes)
                    busy = busy or any((one.schema, one.table) != CANARY for _, one in batch.changes)
                    yield batch
                # What begins in a window and ends behind it is decoded again in the next.
                self._window = _WINDOW_BYTES if found else self._window * 2
                if upto < flushed:
                    continue
                seen = flushed
            # Our own canary tells of no traffic: it alone would have us look twenty times after each.
            pause = _SHORTEST_PAUSE if busy else min(pause * _GROWTH, _LONGEST_PAUSE)
            await self._pause(pause, time.monotonic() - began)

    async def advance(self, lsn: int) -> int:
        """Move the slot to an LSN, at most to what has been handed over whole.

        Raises:
            WalError: the slot or the database is away.
        """
        target = min(lsn, self._handed)
        if target > 0:
            try:
                async with singly(self._engine) as connection, self._slot_free:
                    await advance_slot(connection, self._slot, target)
            except DBAPIError as error:
                raise _failure(error, "the slot cannot be moved") from None
        return target

    def wake(self) -> None:
        """Cut the pause short."""
        self._bell.set()

    async def close(self) -> None:
        """End after the batch at hand; cancel whoever reads to end at once."""
        self._closed = True
        self._bell.set()

    async def _pause(self, pause: float, cost: float) -> None:
        """Wait for the bell or the end of the pause, but at least as long as the look took."""
        await asyncio.sleep(min(cost, _LONGEST_PAUSE))
        try:
            async with asyncio.timeout(max(pause - cost, 0)):
                await self._bell.wait()
        except TimeoutError:
            pass
        self._bell.clear()

    async def _stand(self) -> tuple[int, int, int]:
        """Give the LSNs up to which the log is flushed, where the slot stands, and where decoding starts."""
        try:
            async with singly(self._engine) as connection:
                row = (await connection.execute(_FLUSHED, {"slot": self._slot})).one()
        except (DBAPIError, OSError, TimeoutError) as error:
            raise _failure(error, "the log cannot be read") from None
        if row.confirmed is None:
            raise failure(
                "42704", f'replication slot "{self._slot}" does not exist', "the log cannot be read"
            )
        return row.flushed, row.confirmed, row.restart or row.confirmed

    async def _record_snapshot(self) -> None:
        """Ask for a snapshot, at which later looks may start. It is no matter if it is refused."""
        now = time.monotonic()
        if now < self._next_snapshot:
            return
        self._next_snapshot = now + _SNAPSHOT_SECONDS
        try:
            async with singly(self._engine) as connection:
                await connection.execute(_SNAPSHOT)
        except (DBAPIError, OSError, TimeoutError):
            self._next_snapshot = float("inf")

    async def _look(self, upto: int, *, brief: bool) -> AsyncIterator[WalBatch]:
        """Read the commits below an LSN, in portions; `brief`: there is little to decode."""
        log = Assembler(self._names.known, self._read_to, self._last)
        async with AsyncExitStack() as stack:
            try:
                async for messages in self._messages(stack, upto, brief=brief):
                    for data in messages:
                        unknown = log.feed(data)
                        if unknown:
                            await self._names.learn(unknown, log.said)
                        if log.count >= _BATCH_CHANGES or log.bytes >= _BATCH_BYTES:
                            batch = self._take(log)
                            if batch is not None:
                                yield batch
            except (DBAPIError, OSError, TimeoutError) as error:
                raise _failure(error, "the log cannot be read") from None
        log.pass_to(upto)
        batch = self._take(log)
        if batch is not None:
            yield batch

    async def _messages(self, stack: AsyncExitStack, upto: int, *, brief: bool) -> AsyncIterator[list[bytes]]:
        """Give the messages of a window; what is opened for it is left to the stack."""
        whole = await self._brief(upto) if brief else None
        if whole is not None:
            yield whole
            return
        connection = await stack.enter_async_context(self._engine.connect())
        async for messages in self._portions(connection, upto):
            yield messages

    async def _brief(self, upto: int) -> list[bytes] | None:
        """Read a window by one statement; None where it is more than one portion."""
        async with singly(self._engine) as connection, self._slot_free:
            parameters = {"slot": self._slot, "upto": upto, "publication": quote(self._publication)}
            rows = (await connection.execute(_BRIEF, parameters)).all()
        if rows and rows[0].found > len(rows):
            return None
        return [row.data for row in rows]

    def _take(self, log: Assembler) -> WalBatch | None:
        batch = log.take()
        self._read_to, self._last = log.read_to, log.last
        self._handed = max(self._handed, log.read_to)
        return batch

    async def _portions(self, connection: AsyncConnection, upto: int) -> AsyncIterator[list[bytes]]:
        """Fetch messages, about 2 MiB at a time; the transaction stays open in between."""
        await connection.execute(_SETTINGS)
        declare = _DECLARE.format(
            portion=_PORTION_BYTES,
            slot=_literal(self._slot),
            upto=as_text(upto),
            publication=_literal(quote(self._publication)),
        )
        await connection.exec_driver_sql(declare)
        async with self._slot_free:
            # The first fetch decodes the window; after it the slot is free, and the rest lies on the server.
            rows = await _fetch(connection, 1)
        while rows:
            yield [data for data, _ in rows]
            rows = await _fetch(connection, rows[-1][1])


async def _fetch(connection: AsyncConnection, count: int) -> list[tuple[bytes, int]]:
    # Few different statements: the driver keeps each of them prepared.
    count = 1 << max(0, min(count, _PORTION_ROWS).bit_length() - 1)
    rows = await connection.exec_driver_sql(f"fetch {count} from tailrace_log")
    return [(row.data, row.fits) for row in rows]


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _failure(error: Exception, doing: str) -> WalError:
    origin = getattr(error, "orig", None)
    state = getattr(origin, "sqlstate", None)
    if origin is None:
        return ReadingLostError(f"{doing}: {type(error).__name__}: {error}")
    # The driver's text begins with the class of the error.
    words = str(origin).rsplit(">: ", 1)[-1]
    return failure(state, words, doing)
