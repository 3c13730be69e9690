"""Backfill: giving derive handlers the keys of rows that exist, to close a gap.

Reads a table by primary key, page by page, and puts the keys of its rows into the same lanes as live changes;
their handlers recompute from current state, so no order is owed. Survives a restart at its last page.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

import msgspec
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.catalogue import Catalogue, Table, quote
from worker.kept_keys import PAGE, KeyColumn, kept_keys, lane_keys, print_as_the_log
from worker.registry import Handler
from worker.values import Form
from worker.values.database import is_data_error

log = structlog.get_logger(__name__)

QUIET_SECONDS = 2.0
AGAIN_SECONDS = 60.0
"""What could not be made is tried again after so long, or when a table was altered."""
VISIBLE_SECONDS = 60.0

Put = Callable[[Handler, Sequence[bytes]], Awaitable[None]]

_NEXT = text(
    "update tailrace.backfills set state = 'running' where id = ("
    " select b.id from tailrace.backfills b join tailrace.handlers h on h.name = b.handler"
    " where b.state <> 'done' and h.state = 'active' and b.id <> all (cast(:besides as bigint[]))"
    " order by b.id limit 1)"
    " returning id, handler, schema_name, table_name, phase, cursor"
)
_PROGRESS = text(
    "update tailrace.backfills set cursor = cast(:cursor as jsonb), phase = :phase, keys = keys + :keys"
    " where id = :id"
)
_DONE = text(
    "update tailrace.backfills set state = 'done', cursor = null, done_at = clock_timestamp() where id = :id"
)
# A gap is closed when every handler of its tables computes from what is there, and has been given all keys.
_CLOSE = text(
    "update tailrace.gaps g set state = 'backfilled', closed_at = clock_timestamp() where state = 'open'"
    " and not exists (select from tailrace.backfills b where b.state <> 'done'"
    "  and b.schema_name || '.' || b.table_name = any (g.tables))"
    " and not exists (select from tailrace.handlers h where h.state = 'active' and h.kind = 'change'"
    "  and h.tables && g.tables)"
    " and exists (select from tailrace.handlers h where h.state = 'active' and h.tables && g.tables)"
)


class _Asked(NamedTuple):
    id: int
    handler: str
    schema: str
    table: str
    phase: str
    cursor: list[str] | None


class Backfills:
    """Carries out the backfills that gaps have asked for, one after the other."""

    def __init__(
        self,
        engine: AsyncEngine,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        put: Put,
        until_passed: Callable[[Handler], Awaitable[None]],
        *,
        form: Form = "json",
    ) -> None:
        self._form = form
        self._impossible: dict[int, float] = {}
        self._told: set[int] = set()
        self._version = catalogue.version
        self._engine = engine
        self._handlers = {handler.name: handler for handler in handlers}
        self._catalogue = catalogue
        self._put = put
        self._until_passed = until_passed
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Look at once for a backfill that has been asked for."""
        self._asked.set()

    async def once(self) -> bool:
        """Carry out the next backfill, if there is one."""
        async with self._engine.begin() as connection:
            row = (await connection.execute(_NEXT, {"besides": self._besides()})).one_or_none()
        if row is None:
            return False
        asked = _Asked(*row)
        handler = self._handlers.get(asked.handler)
        if handler is not None:
            reason = await self._attempt(handler, asked)
            if reason is not None:
                self._put_off(asked, reason)
                return True
            # Not before: what Redis loses until then must be given again.
            await self._until_passed(handler)
        async with self._engine.begin() as connection:
            await connection.execute(_DONE, {"id": asked.id})
            await connection.execute(_CLOSE)
        return True

    async def wait(self) -> None:
        """Wait until there may be something to do."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await self._asked.wait()
        except TimeoutError:
            pass
        self._asked.clear()

    def _besides(self) -> list[int]:
        """List what cannot be made now, and must not hold up the others."""
        if self._version != self._catalogue.version:
            self._version = self._catalogue.version
            self._impossible.clear()
        now = time.monotonic()
        self._impossible = {id_: until for id_, until in self._impossible.items() if until > now}
        return list(self._impossible)

    def _put_off(self, asked: _Asked, reason: str) -> None:
        self._impossible[asked.id] = time.monotonic() + AGAIN_SECONDS
        if asked.id not in self._told:
            self._told.add(asked.id)
            table = f"{asked.schema}.{asked.table}"
            log.error("backfill cannot be made yet", handler=asked.handler, table=table, reason=reason)

    async def _attempt(self, handler: Handler, asked: _Asked) -> str | None:
        """Carry out a backfill; returns why it cannot be done, in words, or None."""
        table = self._catalogue.tables.get((asked.schema, asked.table))
        if table is None:
            return "there is no such table"
        columns = _key_columns(handler, asked, table)
        gone = [name for name in columns if name not in table.columns]
        if gone or not table.primary_key:
            return f"the table has no column {gone[0]}" if gone else "the table has no primary key"
        try:
            await self._run(handler, asked, table, columns)
        except Exception as error:
            # Altered while we read: its new shape is known in a moment, and then it is tried again.
            if not is_data_error(error):
                raise
            return f"it could not be read ({type(getattr(error, 'orig', error)).__name__})"
        return None

    async def _run(self, handler: Handler, asked: _Asked, table: Table, columns: Sequence[str]) -> None:
        log.info("backfill begins", handler=handler.name, table=f"{asked.schema}.{asked.table}")
        await self._until_visible()
        keys = 0
        if asked.phase == "rows":
            keys += await self._rows(handler, asked, table, columns)
        if handler.all_keys is not None:
            keys += await self._kept(handler, asked, self._key_columns(table, columns))
        log.info("backfill done", handler=handler.name, table=f"{asked.schema}.{asked.table}", keys=keys)

    async def _until_visible(self) -> None:
        """Wait until everything that has committed by now can be seen: a commit is decoded before that."""
        async with self._engine.connect() as connection:
            start = (
                await connection.execute(text("select pg_snapshot_xmax(pg_current_snapshot())::text"))
            ).scalar_one()
        until = asyncio.get_running_loop().time() + VISIBLE_SECONDS
        while asyncio.get_running_loop().time() < until:
            async with self._engine.connect() as connection:
                seen = await connection.execute(
                    text("select pg_snapshot_xmin(pg_current_snapshot()) >= cast(cast(:x as text) as xid8)"),
                    {"x": start},
                )
                if seen.scalar_one():
                    return
            await asyncio.sleep(0.1)
        log.warning("backfill begins beside a long transaction", waited_seconds=VISIBLE_SECONDS)

    def _key_columns(self, table: Table, names: Sequence[str]) -> list[KeyColumn]:
        return [KeyColumn.of(table.columns[name].value_type, self._form) for name in names]

    async def _rows(self, handler: Handler, asked: _Asked, table: Table, columns: Sequence[str]) -> int:
        primary = table.primary_key
        order = ", ".join(quote(name) for name in primary)
        marks = ", ".join(
            f"cast(cast(:k{n} as text) as {table.columns[name].sql_cast})" for n, name in enumerate(primary)
        )
        selected = [f"{quote(name)}::text" for name in primary]
        ways = self._key_columns(table, columns)
        selected += [way.shown(quote(name)) for name, way in zip(columns, ways, strict=True)]
        select = f"select {', '.join(selected)} from {table.sql_name}"  # noqa: S608 - quoted identifiers
        cursor, total = asked.cursor, 0
        if cursor is not None and len(cursor) != len(primary):
            cursor = None  # of another primary key, before the table was altered
        while True:
            where = f" where ({order}) > ({marks})" if cursor else ""
            async with self._engine.connect() as connection:
                await print_as_the_log(connection, ways)
                found = await connection.execute(
                    text(f"{select}{where} order by {order} limit {PAGE}"),
                    {f"k{n}": value for n, value in enumerate(cursor or ())},
                )
                rows = found.all()
            if rows:
                cursor = list(rows[-1][: len(primary)])
                keys = lane_keys([row[len(primary) :] for row in rows], ways)
                await self._put(handler, keys)
                total += len(keys)
                await self._note(asked, cursor, "rows", len(keys))
            if len(rows) < PAGE:
                await self._note(asked, None, "kept", 0)
                return total

    async def _kept(self, handler: Handler, asked: _Asked, columns: Sequence[KeyColumn]) -> int:
        """Give the keys that the handler keeps: those whose rows are all gone are in no source table."""
        total = 0
        async with (
            self._engine.connect() as connection,
            aclosing(kept_keys(connection, handler, columns)) as pages,
        ):
            async for keys in pages:
                await self._put(handler, keys)
                total += len(keys)
        await self._note(asked, None, "kept", total)
        return total

    async def _note(self, asked: _Asked, cursor: list[str] | None, phase: str, keys: int) -> None:
        async with self._engine.begin() as connection:
            document = None if cursor is None else msgspec.json.encode(cursor).decode()
            await connection.execute(
                _PROGRESS, {"id": asked.id, "cursor": document, "phase": phase, "keys": keys}
            )


def _key_columns(handler: Handler, asked: _Asked, table: Table | None) -> tuple[str, ...]:
    for one in handler.subscriptions:
        if (one.schema, one.table) == (asked.schema, asked.table):
            return one.lane_key or (table.primary_key if table else ())
    return ()
