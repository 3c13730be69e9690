"""Finds out what stands between a process and Postgres: nothing, a session pooler or a transaction pooler.

Behind one that pools transactions a named statement may be unknown to the server that the next transaction
gets, so none may be kept. The port tells it for Supabase's own poolers; for others the server is asked.
"""

import enum
from collections.abc import Awaitable, Callable

import asyncpg

ROUNDS = 3


class Pooling(enum.Enum):
    """What stands between."""

    NONE = "direct"
    SESSION = "session pooler"
    TRANSACTION = "transaction pooler"


async def pooling_of(connect: Callable[[], Awaitable[asyncpg.Connection]]) -> Pooling:
    """Look at the process ids of the backends that answer.

    A pooler makes up the id that it gives at the start. One that pools transactions lends the same backend to
    two connections that rest in turn, or another one to the same connection; one that pools sessions never.

    Args:
        connect: opens a connection that keeps no statements. One or two are opened, and closed.

    Raises:
        asyncpg.PostgresError, OSError, TimeoutError: as it does.
    """
    first = await connect()
    try:
        own = await _backend(first)
        if own == first.get_server_pid():
            return Pooling.NONE
        second = await connect()
        try:
            others = {await _backend(second)}
            for _ in range(ROUNDS):
                if own in others or await _backend(first) != own or len(others) > 1:
                    return Pooling.TRANSACTION
                others.add(await _backend(second))
        finally:
            await second.close()
    finally:
        await first.close()
    return Pooling.SESSION


async def _backend(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("select pg_catalog.pg_backend_pid()"))
