"""The way to Postgres: one engine per process, made from the settings.

It decides how connections are made and what is worth waiting for. It holds no SQL of the mechanism.
"""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import structlog
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from migrations import HEAD

log = structlog.get_logger(__name__)

TRANSACTION_POOLER_PORT = 6543
"""Supavisor's and Supabase's dedicated pooler in transaction mode: named statements cannot live there."""

_LOST_SQLSTATES = ("08", "57P", "53300", "58030", "25006", "25P03", "25P04")


def make_engine(url: str, *, name: str, size: int = 10) -> AsyncEngine:
    """Make the engine of one process.

    Args:
        url: `postgresql://…` or `postgres://…`, direct or through a pooler.
        name: what `pg_stat_activity` shows as application name.
        size: connections at most.
    """
    parsed = make_url(url).set(drivername="postgresql+asyncpg")
    query = dict(parsed.query)
    connect: dict[str, Any] = {"timeout": 10, "server_settings": {"application_name": name}}
    if "sslmode" in query:
        connect["ssl"] = str(query.pop("sslmode"))
    if parsed.port == TRANSACTION_POOLER_PORT:
        connect |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    return create_async_engine(
        parsed.set(query=query),
        connect_args=connect,
        pool_size=size,
        max_overflow=0,
        pool_recycle=1800,
        pool_use_lifo=True,
        hide_parameters=True,  # row values must not reach a log by way of an error message
    )


def forget_statements(engine: AsyncEngine) -> None:
    """Have every connection of the engine prepare its statements anew.

    A prepared statement keeps the types of its parameters after a column's type was altered: until then each
    call of it would fail, on each connection that knows it. The dialect notices that only for what statements
    give back (`cached plan must not change result type`); what it then does is done here.
    """
    dialect: Any = engine.sync_engine.dialect
    dialect._invalidate_schema_cache_asof = time.time()  # noqa: SLF001 - see above


def is_away(error: BaseException) -> bool:
    """Tell whether the database could not even be reached: also what a failed connect raises."""
    # A connect that nobody answers is a TimeoutError, which is an OSError too.
    return is_lost(error) or any(isinstance(one, OSError) for one in _chain(error))


def is_lost(error: BaseException) -> bool:
    """Tell whether the database went away under a statement, rather than the statement being wrong.

    Such trouble is nobody's fault and uses up no attempt. Trouble of a handler's own sockets is not meant.
    """
    for one in _chain(error):
        if isinstance(one, DBAPIError) and one.connection_invalidated:
            return True
        if isinstance(one, (asyncpg.InterfaceError, asyncpg.InternalClientError, PoolTimeoutError)):
            return True
        state = getattr(one, "sqlstate", None)
        if isinstance(state, str) and state.startswith(_LOST_SQLSTATES):
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    """Tell whether another transaction was in the way and the same work may succeed at once."""
    return any(getattr(one, "sqlstate", None) in ("40001", "40P01") for one in _chain(error))


def is_locked(error: BaseException) -> bool:
    """Tell whether a row lock asked for with NOWAIT is held by somebody else."""
    return any(getattr(one, "sqlstate", None) == "55P03" for one in _chain(error))


def sqlstate_of(error: BaseException) -> str | None:
    """Give the SQLSTATE of the statement that failed, if one did."""
    states = (getattr(one, "sqlstate", None) for one in _chain(error))
    return next((state for state in states if isinstance(state, str)), None)


def explain(error: BaseException) -> str:
    """Say in one line why the database cannot be had; never with a password."""
    for one in _chain(error):
        state = getattr(one, "sqlstate", None)
        if state in ("28P01", "28000"):
            return "Postgres refuses the user or password of DATABASE_URL"
        if state == "3D000":
            return "the database named in DATABASE_URL does not exist"
        if state == "42P01" and "tailrace." in str(one):
            return "tailrace's tables are missing: run `python -m worker migrate`"
        if state == "3F000":
            return "schema tailrace is missing: run `python -m worker migrate`"
    innermost = _chain(error)[-1]
    words = next(iter(str(innermost).splitlines()), "")
    return f"Postgres cannot be reached ({type(innermost).__name__}: {words})"


def _chain(error: BaseException) -> list[BaseException]:
    """List the error and what caused it, outermost first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = getattr(one, "orig", None) or one.__cause__ or one.__context__
    return found


async def wait_until_up(
    engine: AsyncEngine, *, most: float = 5.0, told: Callable[[str], None] | None = None
) -> None:
    """Wait, for as long as it takes, until the database answers and tailrace's tables are there.

    Args:
        engine: where to connect.
        most: seconds between two tries at the longest.
        told: is given each new reason, which is also logged once.
    """
    last, delay = "", 0.2
    while (reason := await _why_not(engine)) is not None:
        if reason != last:
            log.warning("waiting for Postgres", reason=reason)
            last = reason
            if told is not None:
                told(reason)
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        delay = min(delay * 2, most)
    if last:
        log.info("Postgres is back")


async def _why_not(engine: AsyncEngine) -> str | None:
    """Tell why the database cannot be worked with; None where it can."""
    try:
        async with engine.connect() as connection:
            found = await connection.execute(text("select max(version_num) from tailrace.migration"))
            revision = found.scalar_one()
    except (DBAPIError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
        return explain(error)
    # A newer revision is an upgrade under way: the new version keeps what the old one needs.
    if revision is None or revision < HEAD:
        return f"tailrace's tables are at {revision}, {HEAD} is needed: run `python -m worker migrate`"
    return None
