"""What people may do about backfills: ask for one, look, cancel it, have it go on.

Carried out by the listener (backfill.py), which finds what is asked for by itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.asked import Operator
from worker.catalogue import quote
from worker.database import is_away
from worker.errors import Refused, Unknown
from worker.paging import escaped

SHOWN = 50

_COLUMNS = (
    "id, handler, schema_name as schema, table_name as table, state, gap, condition, rate, rows, keys,"
    " estimated, asked_by, asked_at, done_at"
)
_HANDLERS = text(
    "select name, kind from tailrace.handlers where state = 'active' and :table = any(tables)"
    " and (cast(:handler as text) is null or name = :handler) order by name"
)
_DELIVERY = text("select delivery from tailrace.source")
_LIST = text(
    f"select {_COLUMNS}"  # noqa: S608 - the names above
    " from tailrace.backfills where cast(:ids as bigint[]) is null or id = any(:ids)"
    " order by state in ('done', 'cancelled'), id desc limit :most"
)
_OPEN = text(
    "select id, state from tailrace.backfills where handler = :handler and schema_name = :schema"
    " and table_name = :table and state in ('waiting', 'running') and asked_by is not null"
    " order by id limit 1"
)
_INSERT = text(
    "insert into tailrace.backfills (handler, schema_name, table_name, condition, rate, estimated, asked_by)"
    " values (:handler, :schema, :table, :condition, :rate, :estimated, :by)"
    " on conflict (handler, schema_name, table_name) where state = 'waiting' and condition is null"
    " do update set rate = excluded.rate, estimated = excluded.estimated, asked_by = excluded.asked_by"
    " returning id"
)
_ESTIMATED = text(
    "select nullif(greatest(reltuples, -1)::bigint, -1) from pg_class where oid = to_regclass(:name)"
)
_CANCEL = text(
    "update tailrace.backfills set state = 'cancelled', done_at = clock_timestamp()"
    " where id = :id and state in ('waiting', 'running') and gap is null returning id"
)
_GO_ON = text(
    "update tailrace.backfills set done_at = null, rate = coalesce(cast(:rate as integer), rate),"
    " state = case state when 'cancelled' then 'waiting' else state end"
    " where id = :id and state <> 'done' returning id"
)


class Wanted(NamedTuple):
    """A backfill, as a person asks for it."""

    schema: str
    table: str
    handler: str | None = None
    condition: str | None = None
    """SQL, for the rows that are meant."""
    rate: int | None = None
    """Rows a second, at most."""

    @classmethod
    def of(
        cls, table: str, handler: str | None = None, condition: str | None = None, rate: int | None = None
    ) -> "Wanted":
        """Read a table's name; without a schema it is of public."""
        schema, _, name = table.rpartition(".")
        return cls(schema or "public", name, handler, condition, rate)

    @property
    def name(self) -> str:
        """The table's name with its schema."""
        return f"{self.schema}.{self.table}"


async def ask(engine: AsyncEngine, operator: Operator, wanted: Wanted) -> list[dict[str, Any]]:
    """Ask for a backfill of a table: one for each handler that is meant.

    Those are all derive handlers of the table, or the handler that is named. Rows are given to a change
    handler only by name: what it does for an INSERT it would do for all of them.

    Raises:
        Refused: nobody computes from the table, the condition makes no sense, or one is under way.
    """
    async with engine.begin() as connection:
        names = await _handlers(connection, wanted)
        await _try_condition(connection, wanted)
        sql_name = f"{quote(wanted.schema)}.{quote(wanted.table)}"
        estimated = None
        if wanted.condition is None:
            estimated = (await connection.execute(_ESTIMATED, {"name": sql_name})).scalar_one_or_none()
        ids = []
        for name in names:
            at = {"handler": name, "schema": wanted.schema, "table": wanted.table}
            if (found := (await connection.execute(_OPEN, at)).one_or_none()) is not None:
                raise Refused(
                    f"backfill {found[0]} of {wanted.name} for {name} is {found[1]}: follow it with"
                    " --resume, or cancel it first"
                )
            row = at | {"condition": wanted.condition, "rate": wanted.rate}
            row |= {"estimated": estimated, "by": operator.name}
            ids.append((await connection.execute(_INSERT, row)).scalar_one())
        return await _list(connection, ids)


async def find(engine: AsyncEngine, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """List backfills: those to be made first, then the newest that are done."""
    async with engine.connect() as connection:
        return await _list(connection, ids)


async def cancel(engine: AsyncEngine, id_: int) -> dict[str, Any]:
    """Have one stop after the page in hand; what it has given to the handlers stays.

    Raises:
        Unknown: there is none of this id.
        Refused: it is over, or closes a gap.
    """
    return await _set(engine, _CANCEL, {"id": id_}, "cannot be cancelled: {reason}")


async def go_on(engine: AsyncEngine, id_: int, rate: int | None = None) -> dict[str, Any]:
    """Have one go on where it was, if it was cancelled; perhaps at another rate.

    Raises:
        Unknown: there is none of this id.
        Refused: it is done.
    """
    return await _set(engine, _GO_ON, {"id": id_, "rate": rate}, "cannot go on: {reason}")


async def _set(
    engine: AsyncEngine, statement: TextClause, parameters: dict[str, Any], refusal: str
) -> dict[str, Any]:
    id_ = parameters["id"]
    async with engine.begin() as connection:
        changed = (await connection.execute(statement, parameters)).one_or_none()
        found = await _list(connection, [id_])
        if not found:
            raise Unknown(f"there is no backfill {id_}")
        if changed is None:
            open_ = found[0]["state"] in ("waiting", "running")
            reason = "it closes a gap" if open_ and found[0]["gap"] else f"it is {found[0]['state']}"
            raise Refused(f"backfill {id_} {refusal.format(reason=reason)}")
        return found[0]


async def _handlers(connection: AsyncConnection, wanted: Wanted) -> list[str]:
    at = {"table": wanted.name, "handler": wanted.handler}
    found = (await connection.execute(_HANDLERS, at)).all()
    derives = [name for name, kind in found if kind == "derive"]
    if derives:
        return derives
    if wanted.handler is not None and found:
        if (await connection.execute(_DELIVERY)).scalar_one_or_none() != "proven":
            raise Refused(
                f"{wanted.handler} is a change handler: in plain delivery rows that are there have no place"
                " among live changes, and would come out of order; proven delivery gives them one"
                " (WORKER_DELIVERY=proven), and derive handlers need none"
            )
        return [wanted.handler]
    if found:
        names = ", ".join(name for name, _ in found)
        raise Refused(
            f"only change handlers follow {wanted.name}: {names}. Each row comes to them as an INSERT;"
            " name the one that is to have them (--handler)"
        )
    nobody = f"handler {wanted.handler} follows" if wanted.handler else "handler follows"
    raise Refused(f"no active {nobody} {wanted.name}; `python -m worker handlers` lists them")


async def _try_condition(connection: AsyncConnection, wanted: Wanted) -> None:
    """See whether Postgres understands the condition, without running it."""
    if wanted.condition is None:
        return
    name = f"{quote(wanted.schema)}.{quote(wanted.table)}"
    try:
        async with connection.begin_nested():
            await connection.execute(text(f"explain select from {name} where ({escaped(wanted.condition)})"))
    except DBAPIError as error:
        if is_away(error):
            raise
        words = next(iter(str(error.orig).splitlines()), "").rpartition("Error'>: ")[2]
        raise Refused(f"--where is no condition on {wanted.name}: {words}") from None


async def _list(connection: AsyncConnection, ids: Sequence[int] | None) -> list[dict[str, Any]]:
    at = {"ids": None if ids is None else list(ids), "most": SHOWN}
    return [dict(row) for row in (await connection.execute(_LIST, at)).mappings()]
