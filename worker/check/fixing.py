"""Does what findings say is safe to be done, and says what it did.

Safe is what changes the catalogue alone, can be taken back, and takes nothing away: tables into the
publication, replica identities, grants for the tables that handlers name, Tailrace's own migrations, and the
eviction policy of a Redis that holds nothing but ours. A replication slot is dropped only for one who has
named it. Nothing here touches a row.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import asyncpg
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker.check.findings import Finding, Fix
from worker.check.redis import run_redis
from worker.database import explain, make_engine
from worker.errors import TailraceError

# To wait for a lock holds up everybody who comes after: better to fail, and be called again.
_LIMITS = "set lock_timeout = '5s'; set statement_timeout = '60s'"


class Done(NamedTuple):
    """What was run."""

    words: str
    error: str = ""
    """Why it failed; empty where it did not."""


def fixes_of(findings: Iterable[Finding], slots: Collection[str]) -> list[Fix]:
    """List what may be done, each step once, in the order in which it is to be done.

    Args:
        findings: of an examination.
        slots: replication slots that a person has named to be dropped.
    """
    fixes = [fix for found in findings if found.is_wrong for fix in found.fixes]
    wanted = dict.fromkeys(fix for fix in fixes if not fix.slot or fix.slot in slots)
    # Migrating makes the publication, if there is none: another statement that makes it would fail then.
    return sorted(wanted, key=lambda one: one.by == "migrate")


async def fix(
    settings: Settings, fixes: Sequence[Fix], migrate: Callable[[AsyncEngine], Awaitable[None]]
) -> list[Done]:
    """Do them in turn; one that fails does not keep the others from being done.

    Args:
        settings: where the servers are.
        fixes: as `fixes_of` listed them.
        migrate: brings Tailrace's tables up to date.
    """
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace check", size=1)
    try:
        return [Done(one.words, await _done(settings, engine, one, migrate)) for one in fixes]
    finally:
        await engine.dispose()


async def _done(
    settings: Settings, engine: AsyncEngine, one: Fix, migrate: Callable[[AsyncEngine], Awaitable[None]]
) -> str:
    """Do one; gives the reason where it failed."""
    try:
        if one.by == "redis":
            await run_redis(settings, one.words)
        elif one.by == "migrate":
            await migrate(engine)
        else:
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                for limit in _LIMITS.split("; "):
                    await connection.execute(text(limit))
                await connection.exec_driver_sql(one.words)
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return _words(error)
    except (RedisError, OSError, TailraceError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _words(error: Exception) -> str:
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    if state == "55P03":
        return "somebody else has locked it for more than 5 s: try again when it is quieter"
    said = explain(error)
    # What is no trouble of the connection, Postgres says best in its own words.
    return said.partition("(")[2].removesuffix(")") if said.startswith("Postgres cannot be reached") else said
