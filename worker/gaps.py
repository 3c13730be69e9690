"""Gaps: intervals in which changes may have been lost, written down where people and backfills find them.

Recording is all that happens here. Derive handlers of the tables are backfilled for each gap (backfill.py).
"""

from collections.abc import Sequence
from datetime import datetime

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

log = structlog.get_logger(__name__)

_RECORD = text(
    "with gap as ("
    " insert into tailrace.gaps (since, until, cause, tables)"
    " values (:since, coalesce(:until, clock_timestamp()), :cause, cast(:qualified as text[])) returning id)"
    " insert into tailrace.backfills (handler, schema_name, table_name, gap)"
    " select h.name, t.schema_name, t.table_name, gap.id from gap, tailrace.handlers h,"
    " unnest(cast(:schemas as text[]), cast(:names as text[])) as t (schema_name, table_name)"
    " where h.kind = 'derive' and h.state = 'active' and t.schema_name || '.' || t.table_name = any(h.tables)"
    " on conflict do nothing"
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
    await connection.execute(
        _RECORD,
        {
            "since": since,
            "until": until,
            "cause": cause,
            "qualified": [f"{schema}.{table}" for schema, table in tables],
            "schemas": [schema for schema, _ in tables],
            "names": [table for _, table in tables],
        },
    )
