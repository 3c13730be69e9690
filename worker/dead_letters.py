"""Dead letters as people see them: found by what they know of them, and decoded. Only reads.

What has failed and will be retried can be seen in the same way, before it is one.

What a person may decide about one is in redriving.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker import audit, overtaking
from worker.asked import Which
from worker.catalogue import read_catalogue
from worker.change import Position, RawChange, RawSource
from worker.edits import readable
from worker.errors import MalformedChange, Unknown
from worker.values import decoder

PAGE = 50
"""Read at a time: payloads may have a megabyte each."""

What = Literal["dead", "held"]

_COLUMNS = (
    "d.id, d.handler, d.lanes, d.keys, d.lsn, d.ordinal, d.source, d.payload, d.changes, d.attempts,"
    " d.status, d.halts, d.redriven, d.error_class, d.error, d.traceback, d.hint, d.first_failed_at,"
    " d.last_failed_at, d.next_attempt_at, d.overtaken_by > 0 as overtaken, h.tables"
)
_MEANT = (
    " from tailrace.held d join tailrace.handlers h on h.name = d.handler"
    " where {what} and d.id > :after"
    " and (cast(:ids as bigint[]) is null or d.id = any(cast(:ids as bigint[])))"
    " and (cast(:handler as text) is null or d.handler = :handler)"
    " and (cast(:error_class as text) is null or d.error_class = :error_class"
    "  or d.error_class like '%.' || :error_class)"
    " and (cast(:since as timestamptz) is null or d.last_failed_at >= :since)"
    " and (cast(:until as timestamptz) is null or d.last_failed_at < :until)"
    " and (cast(:table as text) is null or cast(:table as text) = any(h.tables))"
)
_FIND = f"select {_COLUMNS}{_MEANT} order by d.id limit :most"
_COUNT = text(f"select count(*){_MEANT}".format(what="d.status = 'dead'"))
# Texts of their own: as a parameter, what is meant would keep Postgres from its indexes.
_FINDS: dict[What, TextClause] = {
    "dead": text(_FIND.format(what="d.status = 'dead'")),
    "held": text(_FIND.format(what="d.status = 'retrying' and d.waits_long and d.error_class is not null")),
}
_HANDLER = text("select 1 from tailrace.handlers where name = :name")
_LOWEST = -(2**63)


@dataclass
class DeadLetter:
    """A change that was given up."""

    id: int
    handler: str
    lanes: tuple[int, ...]
    keys: tuple[str, ...]
    """Lane keys: JSON arrays of canonical texts."""
    position: Position
    source: str
    payload: bytes
    changes: int
    attempts: int
    status: str
    halts: bool
    redriven: bool
    overtaken: bool
    """Newer changes of its keys are noted at it; see overtaking.py."""
    failure: dict[str, Any]
    tables: Sequence[str]
    next_attempt_at: datetime | None = None
    """None for a dead letter."""
    raw: RawChange | None = None
    """None for the key of a derive handler, and for what cannot be decoded."""
    primary_key: tuple[str, ...] = field(default=())

    @property
    def table(self) -> tuple[str | None, str | None]:
        """Schema and table of the change; of a derive handler's key the first that it follows."""
        if self.raw is not None:
            return self.raw.schema, self.raw.table
        if self.source != "key" or not self.tables:
            return None, None
        schema, _, name = self.tables[0].partition(".")
        return schema, name

    def told(self) -> dict[str, Any]:
        """Give it as a list shows it."""
        schema, table = self.table
        return {
            "id": self.id,
            "handler": self.handler,
            "schema": schema,
            "table": table,
            "type": None if self.raw is None else self.raw.type,
            "key": self._key(),
            "position": str(self.position),
            "attempts": self.attempts,
            "status": self.status,
            "error_class": self.failure["error_class"],
            "error": self.failure["error"],
            "first_failed_at": self.failure["first_failed_at"],
            "last_failed_at": self.failure["last_failed_at"],
        } | ({} if self.status == "dead" else {"next_attempt_at": self.next_attempt_at})

    def told_wholly(self) -> dict[str, Any]:
        """Give it with its rows, traceback and hint."""
        return self.told() | {
            "hint": self.failure["hint"],
            "traceback": self.failure["traceback"],
            "source": self.source,
            "changes": self.changes,
            "halts": self.halts,
            "redriven": self.redriven,
            "lanes": list(self.lanes),
            "lane_keys": list(self.keys),
            "record": self._row(None if self.raw is None else self.raw.record),
            "old_record": self._row(None if self.raw is None else self.raw.old_record),
        }

    def _key(self) -> list[Any] | None:
        if self.source == "key":
            return list(msgspec.json.decode(self.keys[0]))
        raw = self.raw
        row = None if raw is None else self._row(raw.old_record if raw.record is None else raw.record)
        if row is None or not self.primary_key or not row.keys() >= set(self.primary_key):
            return None
        return [row[name] for name in self.primary_key]

    def _row(self, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """Type what Python can; the rest is as its source wrote it."""
        if row is None or self.raw is None:
            return None
        form = "text" if self.raw.source == "wal" else "json"
        types = {column.name: column.type for column in self.raw.columns}
        values: dict[str, Any] = {}
        for name, value in row.items():
            decode = decoder(types[name], form) if name in types and types[name] != "bytea" else None  # type: ignore[arg-type] # one of two words
            values[name] = readable(value) if decode is None else decode(value)
        return values


async def find(
    connection: AsyncConnection,
    which: Which,
    *,
    after: int | None = None,
    most: int | None = None,
    what: What = "dead",
) -> list[DeadLetter]:
    """Find dead letters, in the order of their ids.

    Args:
        connection: any.
        which: those that are meant.
        after: only ids above this one.
        most: at most so many.
        what: `held` finds what has failed and will be retried instead.
    """
    found: list[DeadLetter] = []
    last = _LOWEST if after is None else after
    parameters = which._asdict() | {"ids": which.possible_ids, "most": PAGE}
    while most is None or len(found) < most:
        page = [_letter(row) for row in await connection.execute(_FINDS[what], parameters | {"after": last})]
        # A handler may follow other tables too.
        found += [one for one in page if which.table in (None, ".".join(filter(None, one.table)))]
        if len(page) < PAGE:
            break
        last = page[-1].id
    found = found[:most]
    await _learn_keys(connection, found)
    return found


async def count(connection: AsyncConnection, which: Which) -> int:
    """Count dead letters, to tell how far one is with them.

    Where a table is meant, those of its handlers for other tables are counted, too: of which table one is,
    stands in its payload.
    """
    parameters = which._asdict() | {"ids": which.possible_ids, "after": _LOWEST}
    return int((await connection.execute(_COUNT, parameters)).scalar_one())


async def check_handler(connection: AsyncConnection, name: str) -> None:
    """See that there is, or was, a handler of this name.

    Raises:
        Unknown: there is none.
    """
    if (await connection.execute(_HANDLER, {"name": name})).first() is None:
        raise Unknown(f"there is no handler {name}")


async def show(connection: AsyncConnection, id_: int, what: What = "dead") -> dict[str, Any]:
    """Tell all that is known of one, with what was decided about it before.

    Raises:
        Unknown: there is none of this id.
    """
    found = await find(connection, Which(ids=(id_,)), what=what)
    if not found and what == "held":
        raise Unknown(f"nothing that has failed is held as {id_}: it is applied by now, or a dead letter")
    if not found:
        raise unknown([id_])
    # What is held is overtaken by nothing: later changes of its keys wait behind it.
    newer = (await overtaking.told(connection, [id_]))[id_] if what == "dead" else None
    return found[0].told_wholly() | {"newer": newer, "audit": await audit.trail(connection, id_)}


def unknown(ids: Sequence[int]) -> Unknown:
    """Say that there are no dead letters of these ids."""
    if len(ids) == 1:
        return Unknown(f"there is no dead letter {ids[0]}")
    return Unknown(f"there are no dead letters {', '.join(map(str, ids))}")


def _letter(row: Any) -> DeadLetter:  # noqa: ANN401 - a row of text(), which has no types
    failure = {
        name: getattr(row, name)
        for name in ("error_class", "error", "traceback", "hint", "first_failed_at", "last_failed_at")
    }
    return DeadLetter(
        id=row.id,
        handler=row.handler,
        lanes=tuple(row.lanes),
        keys=tuple(row.keys),
        position=Position(row.lsn, row.ordinal),
        source=row.source,
        payload=bytes(row.payload or b""),
        changes=row.changes,
        attempts=row.attempts,
        status=row.status,
        halts=row.halts,
        redriven=row.redriven,
        overtaken=row.overtaken,
        failure=failure,
        tables=row.tables,
        next_attempt_at=row.next_attempt_at,
        raw=_raw(row.source, bytes(row.payload or b"")),
    )


def _raw(source: str, payload: bytes) -> RawChange | None:
    known: dict[str, RawSource] = {"wal": "wal", "realtime": "realtime"}
    if source not in known:
        return None
    try:
        return RawChange.decode(known[source], payload)
    except MalformedChange:  # that is why it is dead
        return None


async def _learn_keys(connection: AsyncConnection, letters: Sequence[DeadLetter]) -> None:
    """Ask the catalogue for primary keys; what the log says of a key is truer of the change."""
    raws = [(one, one.raw) for one in letters if one.raw is not None]
    catalogue = await read_catalogue(connection, "", {(raw.schema, raw.table) for _, raw in raws})
    for one, raw in raws:
        one.primary_key = tuple(column.name for column in raw.columns if column.key)
        if not one.primary_key and (table := catalogue.tables.get((raw.schema, raw.table))) is not None:
            one.primary_key = table.primary_key
