"""Gaps: intervals in which changes may have been lost, written down where people and backfills find them.

Recording is all that happens here. Derive handlers of the tables are backfilled for each gap (backfill.py).
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.source import Gap

log = structlog.get_logger(__name__)

_ASK_BACKFILLS = (
    " insert into tailrace.backfills (handler, schema_name, table_name, gap)"
    " select h.name, t.schema_name, t.table_name, gap.id from gap, tailrace.handlers h,"
    " unnest(cast(:schemas as text[]), cast(:names as text[])) as t (schema_name, table_name)"
    " where h.kind = 'derive' and h.state = 'active' and t.schema_name || '.' || t.table_name = any(h.tables)"
    # One that a person has asked for is the gap's now, and cannot be cancelled any more.
    " on conflict (handler, schema_name, table_name) where state = 'waiting' and condition is null"
    " do update set gap = coalesce(backfills.gap, excluded.gap)"
)
_RECORD = text(
    "with gap as ("  # noqa: S608 - the statement above
    " insert into tailrace.gaps (since, until, cause, tables)"
    " values (:since, coalesce(:until, clock_timestamp()), :cause, cast(:qualified as text[])) returning id)"
    f"{_ASK_BACKFILLS}"
)
_WIDEN = text(
    "with gap as ("  # noqa: S608 - as above
    " update tailrace.gaps set until = greatest(until, :until) where id = ("
    "  select max(id) from tailrace.gaps where state = 'open' and cause = :cause"
    "  and tables = cast(:qualified as text[]) and until > cast(:until as timestamptz)"
    "   - interval '1 minute')"
    " returning id), asked as ("
    f"{_ASK_BACKFILLS})"
    " select id from gap"
)


async def record(
    connection: AsyncSession | AsyncConnection,
    *,
    cause: str,
    tables: Sequence[tuple[str, str]],
    since: datetime | None = None,
    until: datetime | None = None,
) -> None:
    """Record a gap in the transaction of the connection, and ask for the backfills that close it.

    Args:
        connection: commits, or does not, with what made the gap.
        cause: in words, for people.
        tables: (schema, table) pairs.
        since: last moment at which nothing was lost, if known.
        until: now if not given.
    """
    await connection.execute(_RECORD, _parameters(cause, tables) | {"since": since, "until": until})


async def widen(connection: AsyncConnection, gap: Gap) -> bool:
    """Record what may be the same trouble as a moment ago: then the gap of that moment is only longer.

    Returns whether it is a new one.
    """
    found = await connection.execute(_WIDEN, _parameters(gap.cause, gap.tables) | {"until": gap.until})
    if found.first() is not None:
        return False
    await record(connection, cause=gap.cause, tables=gap.tables, since=gap.since, until=gap.until)
    return True


def _parameters(cause: str, tables: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "cause": cause,
        "qualified": [f"{schema}.{table}" for schema, table in tables],
        "schemas": [schema for schema, _ in tables],
        "names": [table for _, table in tables],
    }
