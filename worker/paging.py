"""Gives change handlers the rows of a table: written into the log, a page at a time, and read from there.

A page is one transaction: it locks the rows against changes, writes each as it is into the log, and moves the
backfill's cursor. Nobody can change a locked row before the commit, so the commit is a true place for it in
the order of its changes; and page and cursor come about together or not at all, whoever is killed. All else
is the way of every change of the log: a position of its own, read again from the slot, applied once.

No lock is waited for, or we could be part of a deadlock: rows that somebody has locked are left for later.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import structlog
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.catalogue import Table, quote
from worker.change import Given
from worker.values.database import printed
from worker.wal.page import HEAD, ROW, Head, PageColumn, encode_head
from worker.wal.walsender import TEXT_FORM

log = structlog.get_logger(__name__)

MOST: Final = 1_000
FIRST: Final = 200
"""Rows of the first page; later ones are as large as the times below allow."""
LEAST: Final = 100
"""Rows of a page, if there are so many: what is slow whatever its size gets no faster by a smaller one."""
LOCKED_SECONDS: Final = 0.2
"""A page that takes longer is followed by a smaller one: so long others wait for its rows."""
PASSED_SECONDS: Final = 1.0
"""So is one that its handler needs longer for: so long live changes stand behind it."""
MOST_LEFT: Final = 1_000
"""Rows that are left for later; with more of them, they come first."""
AHEAD: Final = 1
"""Pages behind the one that is being written."""

_NOT_PERMITTED: Final = "42501"
_BUSY: Final = frozenset({"55P03", "40P01", "40001"})
"""A lock that cannot be had now, such as that of a table that is being altered."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Between two looks at rows that are locked."""
_TELL_SECONDS: Final = 60.0

# A listener that is frozen in the middle of a page keeps its rows for so long and no longer.
_CURSOR = text(
    "select cursor, rate, secret, set_config('idle_in_transaction_session_timeout', '5s', true)"
    " from tailrace.backfills where id = :id and state = 'running' for update"
)
_MOVED = text(
    "update tailrace.backfills set cursor = cast(:cursor as jsonb), rows = rows + :rows, keys = keys + :rows"
    " where id = :id"
)
_READ_ONLY = text("set transaction read only")
_REACHED = text("select pg_catalog.pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
_GIVER = text("select handler, secret from tailrace.backfills where id = :id")
_PASSED = text(
    "update tailrace.backfills set passed = cast(:cursor as jsonb) where id = :id and state = 'running'"
    " returning id"
)
_REWIND = text(
    "update tailrace.backfills b set cursor = passed from tailrace.handlers h where h.name = b.handler"
    " and h.kind = 'change' and b.state <> 'done'"
    " and (cast(:handler as text) is null or b.handler = :handler)"
)
# Rows that policies hide are an error, not rows that are not there; a table that is being altered is waited
# for by somebody who holds nothing, and not for long.
_CAREFUL: Final = {"row_security": "off", "lock_timeout": "1s"}
# The columns that the log would list: without generated ones and those that the publication leaves out.
_DESCRIBE = text(
    """
    select c.oid::int8, c.relkind::text, c.relreplident::text, p.rowfilter,
           pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(a.attname, a.atttypid::int8, case c.relreplident
               when 'f' then true
               when 'd' then exists (select from pg_catalog.pg_index i where i.indrelid = c.oid
                                     and i.indisprimary and a.attnum = any (i.indkey::int2[]))
               when 'i' then exists (select from pg_catalog.pg_index i where i.indrelid = c.oid
                                     and i.indisreplident and a.attnum = any (i.indkey::int2[]))
               else false end) order by a.attnum)
    from pg_catalog.pg_publication_tables p
    join pg_catalog.pg_namespace n on n.nspname = p.schemaname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
    join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = any (p.attnames)
    where p.pubname = :publication and p.schemaname = :schema and p.tablename = :table and a.attnum > 0
    group by c.oid, c.relkind, c.relreplident, p.rowfilter
    """
)


class CannotPageError(Exception):
    """The rows of the table cannot be given now. The text is the reason."""


class StoppedError(Exception):
    """A person does not want the backfill any more."""


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far the rows are written: the cursor, as Postgres has it.

    Attributes:
        key: the columns of the primary key.
        after: primary key of the last row that was looked for.
        left: keys of rows before it that somebody had locked.
        end: there are no rows behind it.
    """

    key: tuple[str, ...] = ()
    after: tuple[str, ...] | None = None
    left: tuple[tuple[str, ...], ...] = ()
    end: bool = False

    @property
    def is_last(self) -> bool:
        """Whether all is written."""
        return self.end and not self.left

    @classmethod
    def of(cls, cursor: object, key: tuple[str, ...]) -> "Place":
        """Read a cursor.

        Raises:
            CannotPageError: it is one of another primary key.
        """
        if cursor is None:
            return cls(key)
        try:
            place = msgspec.convert(cursor, cls)
        except msgspec.ValidationError:
            place = cls()
        if place.key != key:
            raise CannotPageError(
                "the table has another primary key since the backfill began: cancel it and ask for another"
            )
        return place

    def document(self) -> str:
        """Write it for Postgres."""
        return msgspec.json.encode(self).decode()


class Page(NamedTuple):
    """What was written."""

    place: Place
    rows: int = 0
    seconds: float = 0.0
    """So long rows were locked, at most."""
    upto: int = 0
    """LSN: once all commits below it are in the lanes, so is this page."""
    rate: int | None = None
    """Rows a second that people want, at most."""


class Rows:
    """Whose rows are given to whom, and the statements for that. Their keys come and go as texts."""

    def __init__(self, id_: int, handler: str, table: Table, condition: str | None) -> None:
        self.id = id_
        self.handler = handler
        self.table = table
        self.key = table.primary_key
        self._condition = condition
        self._columns = [_quoted(name) for name in self.key]
        self._casts = [table.columns[name].sql_cast for name in self.key]
        self.name = escaped(table.sql_name)
        # Names that no column has: what is typed or declared names columns without their table.
        self._asked = [f'"tailrace key {n}"' for n in range(len(self.key))]

    def next(self, shape: "_Shape", after: tuple[str, ...] | None, limit: int) -> str:
        """Give the statement that finds the keys of the rows behind one."""
        # By the columns, not by what is selected under their names: as texts, 10 comes before 9.
        order = ", ".join(f"{self.name}.{column}" for column in self._columns)
        marks = ", ".join(f"cast(cast(:k{n} as text) as {cast})" for n, cast in enumerate(self._casts))
        where = [] if after is None else [f"({order}) > ({marks})"]
        where += [f"({escaped(one)})" for one in (self._condition, shape.filter) if one is not None]
        limited = f" where {' and '.join(where)}" if where else ""
        keys = ", ".join(f"{column}::text" for column in self._columns)
        return f"select {keys} from {shape.only}{self.name}{limited} order by {order} limit {limit}"  # noqa: S608 - quoted identifiers

    def named(self, shape: "_Shape") -> str:
        """Give the statement that finds which of some keys have rows."""
        return f"select {', '.join(self._asked)} {self._joined(shape)}"

    def written(self, shape: "_Shape") -> str:
        """Give the statement that locks and writes the rows of some keys; it gives the keys it had locked."""
        values = ", ".join(printed(f"t.{_quoted(column.name)}") for column in shape.columns)
        asked, order = ", ".join(self._asked), ", ".join(f"t.{column}" for column in self._columns)
        # The head is written with the first row, and before it: of a page without rows nothing is.
        return (
            f"with locked as materialized (select {asked}, pg_catalog.convert_to("  # noqa: S608 - as above
            f"pg_catalog.to_json(cast(array[{values}] as text[]))::text, 'UTF8') as content"
            f" {self._joined(shape)} order by {order} for share of t skip locked),"
            " head as materialized (select pg_catalog.pg_logical_emit_message("
            f"true, '{HEAD}', cast(:head as bytea)) as written)"
            f" select {asked}, case when (select written from head) is not null then"
            f" pg_catalog.pg_logical_emit_message(true, '{ROW}', content) end from locked"
        )

    def _joined(self, shape: "_Shape") -> str:
        arrays = ", ".join(f"cast(:k{n} as text[])" for n in range(len(self.key)))
        on = " and ".join(
            f"t.{column} = cast(asked.{name} as {cast})"
            for column, name, cast in zip(self._columns, self._asked, self._casts, strict=True)
        )
        where = "" if shape.filter is None else f" where ({escaped(shape.filter)})"
        return (
            f"from {shape.only}{self.name} as t"
            f" join unnest({arrays}) as asked ({', '.join(self._asked)}) on {on}{where}"
        )

    def head(self, shape: "_Shape", secret: str) -> bytes:
        """Give what comes before the rows."""
        table = self.table
        return encode_head(
            Head(
                self.id,
                secret,
                self.handler,
                table.schema,
                table.name,
                shape.oid,
                shape.identity,
                shape.columns,
            )
        )


class _Shape(NamedTuple):
    """A table as the log would describe its changes now."""

    oid: int
    only: str
    identity: str
    filter: str | None
    """Of the publication: changes of other rows do not come, either."""
    columns: tuple[PageColumn, ...]


class _Sought(NamedTuple):
    """Keys of rows to be written."""

    keys: list[tuple[str, ...]]
    after: tuple[str, ...] | None
    end: bool


class Pages:
    """Writes pages into the log that a reading reads.

    Args:
        engine: lends a connection for each page.
        publication: that the reading reads.
        read_to: tells the LSN below which every commit is in its lanes.
        wake: tells the reading that there is something to read.
        until_quiet: waits while live changes fill the lanes.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        publication: str,
        *,
        read_to: Callable[[], int],
        wake: Callable[[], None],
        until_quiet: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._publication = publication
        self._read_to = read_to
        self._wake = wake
        self.until_quiet = until_quiet

    async def write(self, of: Rows, place: Place, limit: int) -> Page:
        """Write the next page.

        Args:
            of: what.
            place: as the page before left it.
            limit: of rows that are looked for, besides those that were left.

        Raises:
            StoppedError: a person has cancelled the backfill.
            CannotPageError: the table does not allow it.
            sqlalchemy.exc.DBAPIError: the database is away, or the table was altered.
        """
        try:
            page = await self._lock_and_write(of, place, await self._seek(of, place, limit))
        except DBAPIError as error:
            state = str(getattr(error.orig, "sqlstate", None) or "")
            if state == _NOT_PERMITTED:
                raise CannotPageError(_refused(of.table)) from None
            if state not in _BUSY:
                raise
            return Page(place)
        self._wake()
        return page._replace(upto=await self.reached())

    async def until_read(self, upto: int) -> None:
        """Wait until all below an LSN is in the lanes."""
        while self._read_to() < upto:  # noqa: ASYNC110 - it is read elsewhere, batch by batch
            await asyncio.sleep(0.02)

    async def reached(self) -> int:
        """Give the LSN below which is all that has committed."""
        async with self._engine.connect() as connection:
            return int((await connection.execute(_REACHED)).scalar_one())

    async def passed(self, id_: int, place: Place) -> None:
        """Note that the handler's lanes have passed all rows up to a place.

        Raises:
            StoppedError: a person has cancelled the backfill.
        """
        async with self._engine.begin() as connection:
            found = await connection.execute(_PASSED, {"id": id_, "cursor": place.document()})
            if found.one_or_none() is None:
                raise StoppedError

    async def _seek(self, of: Rows, place: Place, limit: int) -> _Sought:
        """Find the keys of the next rows, and which of those that were left have a row still."""
        async with self._engine.connect() as connection:
            await connection.execute(_READ_ONLY)  # the condition is what a person has typed
            await connection.execute(_settings(_CAREFUL))
            shape = await self._shape(connection, of)
            keys: list[tuple[str, ...]] = []
            if place.left:
                found = await connection.execute(text(of.named(shape)), _arrays(place.left))
                keys = [tuple(row) for row in found]
            if place.end or len(keys) >= MOST_LEFT:
                return _Sought(keys, place.after, place.end)
            marks = {f"k{n}": value for n, value in enumerate(place.after or ())}
            found = await connection.execute(text(of.next(shape, place.after, limit)), marks)
            further = [tuple(row) for row in found]
            after = further[-1] if further else place.after
            return _Sought([*keys, *further], after, len(further) < limit)

    async def _lock_and_write(self, of: Rows, place: Place, sought: _Sought) -> Page:
        async with self._engine.begin() as connection:
            row = (await connection.execute(_CURSOR, {"id": of.id})).one_or_none()
            if row is None:
                raise StoppedError
            before, rate, secret = Place.of(row[0], of.key), row[1], row[2]
            if before != place:
                return Page(before, rate=rate)  # another listener has written on
            await connection.execute(_settings({**TEXT_FORM, **_CAREFUL}))
            shape = await self._shape(connection, of)
            began = time.monotonic()
            written: set[tuple[str, ...]] = set()
            if sought.keys:
                arguments = _arrays(sought.keys) | {"head": of.head(shape, secret)}
                found = await connection.execute(text(of.written(shape)), arguments)
                written = {tuple(one[:-1]) for one in found}
            left = tuple([key for key in sought.keys if key not in written])
            now = Place(of.key, sought.after, left, sought.end)
            if now != before:
                moved = {"id": of.id, "cursor": now.document(), "rows": len(written)}
                await connection.execute(_MOVED, moved)
        return Page(now, len(written), time.monotonic() - began, rate=rate)

    async def _shape(self, connection: AsyncConnection, of: Rows) -> _Shape:
        """Describe the table, which nobody alters from then on to the end of the transaction."""
        await connection.execute(text(f"select from {of.name} limit 0"))
        at = {"publication": self._publication, "schema": of.table.schema, "table": of.table.name}
        row = (await connection.execute(_DESCRIBE, at)).one_or_none()
        if row is None:
            raise CannotPageError(f"the publication {self._publication} does not have the table")
        oid, kind, identity, filter_, columns = row
        described = msgspec.json.decode(columns) if isinstance(columns, str) else columns
        only = "" if kind == "p" else "only "  # rows of a partition are rows of the table, others are not
        return _Shape(oid, only, identity, filter_, msgspec.convert(described, tuple[PageColumn, ...]))


class Pace:
    """Keeps a rate."""

    def __init__(self) -> None:
        self._next = time.monotonic()

    async def keep(self, rows: int, rate: int | None) -> None:
        """Wait after so many rows; what took long by itself is not made up for."""
        if rate is not None:
            self._next = max(self._next + rows / rate, time.monotonic())
            await asyncio.sleep(self._next - time.monotonic())


class _Size:
    """How many rows the next page has: as many as are a burden to others for a moment only."""

    def __init__(self) -> None:
        self._rows = FIRST

    def limit(self, rate: int | None) -> int:
        return max(1, min(self._rows, MOST, rate or MOST))

    def locked(self, page: Page) -> None:
        """Take into account how long a page was locked."""
        if page.seconds > LOCKED_SECONDS:
            self._rows = max(LEAST, self._rows // 2)
        elif page.rows >= self._rows and page.seconds < LOCKED_SECONDS / 3:
            self._rows = min(MOST, self._rows * 2)

    def passed(self, rows: int, seconds: float) -> None:
        """Take into account how long the handler took for a page."""
        if rows and seconds > PASSED_SECONDS:
            self._rows = max(LEAST, min(self._rows, int(rows * PASSED_SECONDS / seconds)))


class Giving:
    """Gives the rows of a table to a change handler, from where an earlier listener ended, to the end."""

    def __init__(self, pages: Pages, of: Rows, until_passed: Callable[[], Awaitable[None]]) -> None:
        self._pages = pages
        self._of = of
        self._until_passed = until_passed
        self._size = _Size()
        self._under_way: deque[tuple[asyncio.Future[float], Page]] = deque()
        self.rows = 0

    async def run(self, cursor: object) -> None:
        """Give them, and wait until the handler's lanes have passed all.

        Raises:
            StoppedError: a person has cancelled the backfill.
            CannotPageError: the table does not allow it.
        """
        place, pace, rate = Place.of(cursor, self._of.key), Pace(), None
        waiting = _Waiting(self._of)
        try:
            while not place.is_last:
                await self._pages.until_quiet()
                page = await self._pages.write(self._of, place, self._size.limit(rate))
                self._size.locked(page)
                if page.place == place:
                    await waiting.pause(len(place.left))
                    continue
                place, rate = page.place, page.rate
                await waiting.moved(page.rows)
                self.rows += page.rows
                await pace.keep(page.rows, rate)
                self._under_way.append((asyncio.ensure_future(self._passing(page)), page))
                while len(self._under_way) > AHEAD:
                    await self._first()
            while self._under_way:
                await self._first()
            # What a listener before this one has written last may still be on its way.
            await self._pages.until_read(await self._pages.reached())
            await self._until_passed()
        finally:
            for passing, _page in self._under_way:
                passing.cancel()

    async def _passing(self, page: Page) -> float:
        began = time.monotonic()
        await self._pages.until_read(page.upto)
        await self._until_passed()
        return time.monotonic() - began

    async def _first(self) -> None:
        passing, page = self._under_way[0]
        self._size.passed(page.rows, await passing)
        self._under_way.popleft()
        await self._pages.passed(self._of.id, page.place)


class _Waiting:
    """Waits for rows that others have locked: longer and longer, and says so when it takes a minute."""

    def __init__(self, of: Rows) -> None:
        self._of = of
        self._pause = _SHORTEST_PAUSE
        self._since = time.monotonic()
        self._told = False

    async def pause(self, left: int) -> None:
        """Wait for a moment."""
        if not self._told and time.monotonic() - self._since > _TELL_SECONDS:
            self._told = True
            name = f"{self._of.table.schema}.{self._of.table.name}"
            log.warning("backfill waits for locked rows", handler=self._of.handler, table=name, rows=left)
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    async def moved(self, rows: int) -> None:
        """Note that something was written; what was only left is looked at again after a moment."""
        if rows:
            self._pause, self._since, self._told = _SHORTEST_PAUSE, time.monotonic(), False
        else:
            await asyncio.sleep(_SHORTEST_PAUSE)


class Givers:
    """Knows which rows in the log are those of a backfill, and not what somebody else has put there."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._known: dict[int, tuple[str, str]] = {}
        self._told: set[int] = set()

    async def have_given(self, given: Given) -> bool:
        """Tell whether it is the backfill's that it says.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        known = self._known.get(given.backfill)
        if known is None:
            async with self._engine.connect() as connection:
                found = (await connection.execute(_GIVER, {"id": given.backfill})).one_or_none()
            if found is None:
                self._tell(given.backfill)
                return False
            known = self._known[given.backfill] = (found[0], found[1])
        if (given.handler, given.secret) == known:
            return True
        self._tell(given.backfill)
        return False

    def _tell(self, id_: int) -> None:
        if id_ not in self._told:
            if len(self._told) < MOST:
                self._told.add(id_)
            log.warning("rows in the log are of no backfill: somebody else has written them", backfill=id_)


async def rewind(connection: AsyncConnection, handler: str | None = None) -> None:
    """Have rows that were written, and may have been lost with the log, written again.

    Args:
        connection: in the transaction that passes over a part of the log.
        handler: whose lanes have passed over it; all by default.
    """
    await connection.execute(_REWIND, {"handler": handler})


def _settings(values: Mapping[str, str]) -> TextClause:
    made = [f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in values.items()]
    return text(f"select {', '.join(made)}")


def _arrays(keys: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    return {f"k{n}": list(values) for n, values in enumerate(zip(*keys, strict=True))}


def _quoted(name: str) -> str:
    return escaped(quote(name))


def escaped(part: str) -> str:
    """Make something a part of a statement, such as a condition: what looks like a parameter is none."""
    return part.replace(":", "\\:")


def _refused(table: Table) -> str:
    return (
        f"the user of DATABASE_URL may not read and lock all rows of {table.sql_name}: they are locked while"
        f" they are written into the log, which needs GRANT SELECT, UPDATE ON {table.sql_name} TO that user,"
        " and no policy of row-level security may hide rows from it"
    )
