"""Backfill: giving handlers the rows that exist; derive handlers their keys, to close a gap.

Reads a table by primary key, page by page, and puts the keys of its rows into the same lanes as live changes;
derive handlers recompute from current state, so no order is owed. Live changes go first: what is under way at
a time is bounded, and waits while the lanes are busy. A restart goes on behind the last row whose key all
lanes have passed; what Redis has lost of later ones is read again. Change handlers are owed an order: their
rows go through the log (paging.py), where there is one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, Self

import msgspec
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.catalogue import Catalogue, Table, quote
from worker.database import singly
from worker.kept_keys import PAGE, KeyColumn, kept_keys, lane_keys, print_as_the_log
from worker.lease import limited
from worker.paging import CannotPageError, Giving, Pace, Pages, Rows, StoppedError, escaped
from worker.registry import Handler
from worker.values import Form
from worker.values.database import is_data_error

log = structlog.get_logger(__name__)

QUIET_SECONDS = 2.0
AGAIN_SECONDS = 60.0
"""What could not be made is tried again after so long, or when a table was altered."""
VISIBLE_SECONDS = 60.0
STRETCH = 5
"""Pages, at most, between two looks at what the lanes have passed."""
STRETCH_SECONDS = 2.0
AHEAD = 2
"""Stretches that are under way at a time."""

Put = Callable[[Handler, Sequence[bytes]], Awaitable[None]]

# Gaps first: until they are closed, what is derived may be wrong.
# A listener that is frozen in one of these must not keep a backfill from the next one.
_NEXT = limited(
    "update tailrace.backfills set state = 'running' where id = ("
    " select b.id from tailrace.backfills b join tailrace.handlers h on h.name = b.handler"
    " where b.state in ('waiting', 'running') and h.state = 'active'"
    " and b.id <> all (cast(:besides as bigint[])) order by b.gap is null, b.id limit 1)"
    " returning id, handler, schema_name, table_name, phase, cursor, condition, rate,"
)
_PROGRESS = limited(
    "update tailrace.backfills set cursor = cast(:cursor as jsonb), phase = :phase, rows = rows + :rows,"
    " keys = keys + :keys where id = :id and state = 'running' returning rate,"
)
_DONE = limited(
    "update tailrace.backfills set state = 'done', cursor = null, passed = null,"
    " done_at = clock_timestamp()"
    " where id = :id and state = 'running' returning"
)
# A gap is closed when every handler of its tables computes from what is there, and has been given all keys.
_CLOSE = text(
    "update tailrace.gaps g set state = 'backfilled', closed_at = clock_timestamp() where state = 'open'"
    " and not exists (select from tailrace.backfills b where b.state in ('waiting', 'running')"
    "  and b.condition is null and b.schema_name || '.' || b.table_name = any (g.tables))"
    " and not exists (select from tailrace.handlers h where h.state = 'active' and h.kind = 'change'"
    "  and h.tables && g.tables)"
    " and exists (select from tailrace.handlers h where h.state = 'active' and h.tables && g.tables)"
)
_READ_ONLY = text("set transaction read only")


class _Asked(NamedTuple):
    id: int
    handler: str
    schema: str
    table: str
    phase: str
    cursor: Any
    condition: str | None
    rate: int | None


class Backfills:
    """Carries out the backfills that gaps and people have asked for, several at once if need be."""

    def __init__(
        self,
        engine: AsyncEngine,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        put: Put,
        until_passed: Callable[[Handler], Awaitable[None]],
        *,
        form: Form = "json",
        pages: Pages | None = None,
    ) -> None:
        self._form = form
        self._pages = pages
        self._impossible: dict[int, float] = {}
        self._told: set[int] = set()
        self._version = catalogue.version
        self._engine = engine
        self._handlers = {handler.name: handler for handler in handlers}
        self._catalogue = catalogue
        self._put = put
        self._until_passed = until_passed
        self._asked = asyncio.Event()
        self._choosing = asyncio.Lock()
        self._under_way: set[int] = set()
        self._quiet_until = 0.0

    def ask(self) -> None:
        """Look at once for a backfill that has been asked for."""
        self._quiet_until = 0.0
        self._asked.set()

    async def once(self) -> bool:
        """Carry out the next backfill, if there is one."""
        async with self._choosing:
            if time.monotonic() < self._quiet_until:
                return False  # another task has just looked for all of them
            # Before the look: what is asked for while it lasts is looked for again.
            self._quiet_until = time.monotonic() + QUIET_SECONDS / 2
            async with singly(self._engine) as connection:
                row = (await connection.execute(_NEXT, {"besides": self._besides()})).one_or_none()
            if row is None:
                return False
            self._quiet_until = 0.0
            asked = _Asked(*row[:-1])
            self._under_way.add(asked.id)
        try:
            await self._carry_out(asked)
        except StoppedError:
            log.info("backfill cancelled", handler=asked.handler, table=f"{asked.schema}.{asked.table}")
        finally:
            self._under_way.discard(asked.id)
        return True

    async def _carry_out(self, asked: _Asked) -> None:
        handler = self._handlers.get(asked.handler)
        if handler is not None:
            reason = await self._attempt(handler, asked)
            if reason is not None:
                self._put_off(asked, reason)
                return
        async with self._engine.begin() as connection:
            await connection.execute(_DONE, {"id": asked.id})
            await connection.execute(_CLOSE)

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
        return [*self._impossible, *self._under_way]

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
        if handler.kind == "change":
            return await self._give(handler, asked, table)
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
            return _unreadable(error)
        return None

    async def _give(self, handler: Handler, asked: _Asked, table: Table) -> str | None:
        """Give a change handler the rows; returns why that cannot be done, in words, or None."""
        if self._pages is None:
            return "in plain delivery the rows have no place among live changes: WORKER_DELIVERY=proven"
        if not table.primary_key:
            return "the table has no primary key"
        followed = [
            one for one in handler.subscriptions if (one.schema, one.table) == (asked.schema, asked.table)
        ]
        if not any("INSERT" in one.types for one in followed):
            return "its types= has no INSERT, and rows come as INSERTs"
        name = f"{asked.schema}.{asked.table}"
        log.info("backfill begins", handler=handler.name, table=name)
        rows = Rows(asked.id, handler.name, table, asked.condition)
        giving = Giving(self._pages, rows, partial(self._until_passed, handler))
        try:
            await giving.run(asked.cursor)
        except CannotPageError as reason:
            return str(reason)
        except Exception as error:
            if not is_data_error(error):
                raise
            return _unreadable(error)
        log.info("backfill done", handler=handler.name, table=name, keys=giving.rows)
        return None

    async def _run(self, handler: Handler, asked: _Asked, table: Table, columns: Sequence[str]) -> None:
        log.info("backfill begins", handler=handler.name, table=f"{asked.schema}.{asked.table}")
        await self._until_visible()
        keys = 0
        if asked.phase == "rows":
            keys += await self._rows(handler, asked, table, columns)
        if handler.all_keys is not None and asked.condition is None:
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
        # By the columns, not by what is selected under their names: as texts, 10 comes before 9.
        order = ", ".join(f"{table.sql_name}.{quote(name)}" for name in primary)
        marks = ", ".join(
            f"cast(cast(:k{n} as text) as {table.columns[name].sql_cast})" for n, name in enumerate(primary)
        )
        selected = [f"{quote(name)}::text" for name in primary]
        ways = self._key_columns(table, columns)
        selected += [way.shown(quote(name)) for name, way in zip(columns, ways, strict=True)]
        select = f"select {', '.join(selected)} from {table.sql_name}"  # noqa: S608 - quoted identifiers
        cursor: list[str] | None = asked.cursor
        if not isinstance(cursor, list) or len(cursor) != len(primary):
            cursor = None  # of another primary key, before the table was altered
        read = partial(self._page, select, order, marks, ways, asked.condition)
        note = partial(self._note, asked, "rows")
        pace, more = _Pace(), True
        async with _UnderWay(partial(self._until_passed, handler), note, asked.rate) as under_way:
            while more:
                rows = keys = 0
                pace.begin_stretch()
                while more and not pace.stretch_is_over():
                    limit = min(PAGE, under_way.rate or PAGE)
                    page = await read(cursor, limit)
                    more = len(page) == limit
                    if page:
                        cursor = list(page[-1][: len(primary)])
                        made = lane_keys([row[len(primary) :] for row in page], ways)
                        await self._put(handler, made)
                        rows, keys = rows + len(page), keys + len(made)
                        await pace.keep(len(page), under_way.rate)
                await under_way.add(cursor, rows, keys)
            await under_way.all()
        await self._note(asked, "kept", None, 0, 0)
        return under_way.keys

    async def _page(
        self,
        select: str,
        order: str,
        marks: str,
        ways: Sequence[KeyColumn],
        condition: str | None,
        after: list[str] | None,
        limit: int,
    ) -> Sequence[Any]:
        where = [f"({order}) > ({marks})"] if after else []
        where += [] if condition is None else [f"({escaped(condition)})"]
        limited = f" where {' and '.join(where)}" if where else ""
        async with self._engine.connect() as connection:
            await connection.execute(_READ_ONLY)
            await print_as_the_log(connection, ways)
            found = await connection.execute(
                text(f"{select}{limited} order by {order} limit {limit}"),
                {f"k{n}": value for n, value in enumerate(after or ())},
            )
            return found.all()

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
        # Not before: what Redis loses until then must be given again.
        await self._until_passed(handler)
        await self._note(asked, "kept", None, 0, total)
        return total

    async def _note(
        self, asked: _Asked, phase: str, cursor: list[str] | None, rows: int, keys: int
    ) -> int | None:
        """Note how far it is; returns the rate at which to go on."""
        document = None if cursor is None else msgspec.json.encode(cursor).decode()
        at = {"id": asked.id, "cursor": document, "phase": phase, "rows": rows, "keys": keys}
        async with self._engine.begin() as connection:
            found = (await connection.execute(_PROGRESS, at)).one_or_none()
        if found is None:
            raise StoppedError
        rate: int | None = found[0]
        return rate


class _UnderWay:
    """Stretches of a table that the lanes have been given, until they have passed them."""

    def __init__(
        self,
        until_passed: Callable[[], Awaitable[None]],
        note: Callable[[list[str] | None, int, int], Awaitable[int | None]],
        rate: int | None,
    ) -> None:
        self._until_passed = until_passed
        self._note = note
        self.rate = rate
        """Rows a second, as it was when the last stretch was passed: people may change it."""
        self._stretches: deque[tuple[asyncio.Future[None], list[str] | None, int, int]] = deque()
        self.keys = 0
        """Passed."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for passed, _cursor, _rows, _keys in self._stretches:
            passed.cancel()

    async def add(self, cursor: list[str] | None, rows: int, keys: int) -> None:
        """Add one; waits for the first where there are too many."""
        self._stretches.append((asyncio.ensure_future(self._until_passed()), cursor, rows, keys))
        while len(self._stretches) > AHEAD:
            await self._first()

    async def all(self) -> None:
        """Wait until all are passed."""
        while self._stretches:
            await self._first()

    async def _first(self) -> None:
        passed, cursor, rows, keys = self._stretches[0]
        await passed
        self._stretches.popleft()
        self.keys += keys
        self.rate = await self._note(cursor, rows, keys)


class _Pace(Pace):
    """Keeps a rate, and stretches short in time, so that what people want is heard of soon."""

    def __init__(self) -> None:
        super().__init__()
        self._pages = 0
        self._began = 0.0

    def begin_stretch(self) -> None:
        self._pages, self._began = 0, time.monotonic()

    def stretch_is_over(self) -> bool:
        return self._pages == STRETCH or time.monotonic() - self._began > STRETCH_SECONDS

    async def keep(self, rows: int, rate: int | None) -> None:
        self._pages += 1
        await super().keep(rows, rate)


def _unreadable(error: Exception) -> str:
    return f"it could not be read ({type(getattr(error, 'orig', error)).__name__})"


def _key_columns(handler: Handler, asked: _Asked, table: Table | None) -> tuple[str, ...]:
    for one in handler.subscriptions:
        if (one.schema, one.table) == (asked.schema, asked.table):
            return one.lane_key or (table.primary_key if table else ())
    return ()
