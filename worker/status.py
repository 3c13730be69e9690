"""The state as Postgres and Redis have it: what `/status` and `python -m worker status` show.

Reads only. What just one process knows (is the socket up, is it ready) is added by that process.
"""

import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from config.settings import Settings
from worker import lease, telemetry
from worker.change import Position
from worker.database import make_engine
from worker.lanes import NOTHING, Lanes, by_handler
from worker.queue import connection_pool

MOST_LANES = 64
"""Lanes of a handler that are told one by one; of more, neighbours are told together."""

_HANDLERS = text(
    "select h.name, h.state, h.paused, h.filtered, coalesce(sum(l.read), 0)::bigint,"
    " coalesce(sum(l.applied), 0)::bigint, h.kind, h.tables,"
    " coalesce(array_agg(l.holding order by l.lane) filter (where l.lane is not null), '{}')"
    " from tailrace.handlers h left join tailrace.lanes l on l.handler = h.name"
    " group by h.name order by h.name"
)
_HELD = text(
    "select handler, status, sum(changes)::bigint,"
    " extract(epoch from clock_timestamp() - min(held_at))::float8 from tailrace.held"
    " group by handler, status"
)
# A length is told by the row itself: no payload is read for it.
_PAYLOADS = text(
    "select handler, count(*), sum(octet_length(payload))::bigint from tailrace.payloads group by handler"
)
# The mark of a paused key counts the changes for which it stands.
_FIELDS = {"retrying": "held", "parked": "parked", "paused": "parked", "dead": "dead"}
_FAILURES = text(
    "select handler, error_class, status, sum(changes)::bigint as changes, sum(attempts)::bigint as attempts,"
    " extract(epoch from clock_timestamp() - min(held_at))::float8 as oldest_seconds"
    " from tailrace.held where error_class is not null"
    " group by handler, error_class, status order by handler, error_class, status limit 200"
)
_GAPS = text(
    "select id, since, until, cause, tables, state from tailrace.gaps where state = 'open'"
    " order by id desc limit 50"
)
_BACKFILLS = text(
    "select id, handler, schema_name || '.' || table_name as table, state, rows, keys, estimated, rate,"
    " asked_at, gap is not null as closes_gap"
    " from tailrace.backfills where state in ('waiting', 'running') order by id limit 50"
)
_COUNTS = text(
    "select (select count(*) from tailrace.gaps where state = 'open') as gaps_open,"
    " count(*) filter (where state = 'waiting') as backfills_waiting,"
    " count(*) filter (where state = 'running') as backfills_running from tailrace.backfills"
)


async def read(engine: AsyncEngine, lanes: Lanes) -> dict[str, Any]:
    """Read the state.

    Raises:
        sqlalchemy.exc.DBAPIError, OSError: Postgres is away.
    """
    async with engine.connect() as connection:
        # One snapshot: what the counters add up to must be of one moment.
        await connection.execution_options(isolation_level="REPEATABLE READ")
        row = (await connection.execute(text("select delivery, generation from tailrace.source"))).one()
        handlers = await _handlers(connection)
        gaps = [dict(found) for found in (await connection.execute(_GAPS)).mappings()]
        backfills = [dict(found) for found in (await connection.execute(_BACKFILLS)).mappings()]
        failures = [
            {**found, "status": _FIELDS[found["status"]]}
            for found in (await connection.execute(_FAILURES)).mappings()
        ]
        counts = dict((await connection.execute(_COUNTS)).mappings().one())
        active = await lease.holder(connection)
    workers, backlog = await _from_redis(lanes, row[1], handlers)
    for handler in handlers.values():
        each = handler["lanes"]
        handler["lanes"] = {"count": len(each["holding"])} | {name: _folded(each[name]) for name in each}
    return {
        "delivery": row[0],
        "reason": None,
        "ready": False,
        "reasons": [],
        "version": telemetry.own_version(),
        "listener": active.name if active else None,
        "handlers": handlers,
        "failures": failures,
        "realtime": {
            "connected": None,
            "subscribed": None,
            "missed": None,
            "extra": None,
            "lag_seconds": None,
        },
        "slot": None,
        "gaps": gaps,
        "workers": workers,
        "backfills": backfills,
        "counts": counts | {"backlog": backlog},
    }


async def _handlers(connection: AsyncConnection) -> dict[str, dict[str, Any]]:
    handlers: dict[str, dict[str, Any]] = {}
    found = await connection.execute(_HANDLERS)
    for name, state, paused, filtered, passed, applied, kind, tables, holding in found:
        handlers[name] = {
            "state": state,
            "kind": kind,
            "tables": tables,
            "read": filtered + passed,
            "filtered": filtered,
            "applied": applied,
            "held": 0,
            "parked": 0,
            "dead": 0,
            "queued": 0,
            "queued_bytes": 0,
            "payloads": 0,
            "payload_bytes": 0,
            "lag_seconds": 0.0,
            "paused": paused,
            "lanes": {"queued": [0] * len(holding), "holding": holding},
        }
    for name, status, changes, seconds in await connection.execute(_HELD):
        handlers[name][_FIELDS[status]] += changes
        if status == "parked":
            handlers[name]["lag_seconds"] = seconds
    for name, count, size in await connection.execute(_PAYLOADS):
        if name in handlers:  # the rows of a handler that was removed are swept
            handlers[name] |= {"payloads": count, "payload_bytes": size}
    return handlers


async def _from_redis(
    lanes: Lanes, generation: str | None, handlers: dict[str, dict[str, Any]]
) -> tuple[list[str], dict[str, int] | None]:
    """Add what is queued, and how old the oldest of it is.

    Returns the living workers, and the backlog of all handlers; None where Redis is away.
    """
    if generation is None:
        return [], {"entries": 0, "bytes": 0}
    try:
        tops = await lanes.tops(generation)
        passed = await lanes.passed(generation)
        backlogs = {lane: top.above(passed.get(lane)) for lane, top in tops.items()}
        for name, backlog in by_handler(backlogs).items():
            if name in handlers:
                handlers[name]["queued"] = backlog.changes
                handlers[name]["queued_bytes"] = backlog.size
                handlers[name]["read"] += backlog.changes
        for lane in [lane for lane, backlog in backlogs.items() if backlog.entries]:
            if lane.handler in handlers and lane.number < len(handlers[lane.handler]["lanes"]["queued"]):
                handlers[lane.handler]["lanes"]["queued"][lane.number] = backlogs[lane].changes
            oldest = (await lanes.read(generation, lane, Position(0, 0), 1)).reads
            if oldest and lane.handler in handlers:
                waited = max(0.0, time.time() - oldest[0].entry.at)
                handlers[lane.handler]["lag_seconds"] = max(handlers[lane.handler]["lag_seconds"], waited)
        everything = sum(backlogs.values(), NOTHING)
        return await lanes.workers(), {"entries": everything.entries, "bytes": everything.size}
    except (RedisError, OSError):
        for handler in handlers.values():
            handler["queued"] = handler["queued_bytes"] = None
            handler["lanes"]["queued"] = None
        return [], None


def _folded(each: list[int] | None) -> list[int] | None:
    """Add up neighbours, until there are no more than can be shown."""
    if each is None:
        return None
    step = -(-len(each) // MOST_LANES) or 1
    return [sum(each[first : first + step]) for first in range(0, len(each), step)]


async def read_status(settings: Settings) -> dict[str, Any]:
    """Read the state for a command, over connections of its own."""
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace status", size=1)
    redis: Redis = Redis(connection_pool=connection_pool(settings.redis_url.get_secret_value(), retries=0))
    try:
        return await read(engine, Lanes(redis, settings.queue))
    finally:
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()
