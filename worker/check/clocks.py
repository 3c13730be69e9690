"""Examines the clocks: this machine's against those of Postgres, Redis and Supabase.

Leases and retries go by Postgres's clock alone. Tokens, waits as they are shown and, in plain delivery,
positions go by ours: a clock that is wrong by seconds makes figures wrong, by more it has tokens refused.
"""

import asyncio
import email.utils
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import asyncpg
import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings
from worker.check.findings import Finding
from worker.database import make_engine
from worker.queue import connection_pool

NOTICED_SECONDS = 2.0
REFUSED_SECONDS = 10.0
"""By so much clocks may differ where tokens are verified."""
_TIMEOUT = 5.0
_SYNC = "have both machines' clocks kept by NTP (here: timedatectl set-ntp true)"

_NOW = text("select extract(epoch from clock_timestamp())::float8")


class Clock(NamedTuple):
    """How another clock compares with ours."""

    name: str
    ahead: float
    """Seconds by which it is ahead of ours, at least; 0 where the measurement cannot tell."""


async def examine_clocks(settings: Settings) -> list[Finding]:
    """Return what is to be said of the clocks; of one that cannot be asked, nothing."""
    asked: dict[str, Callable[[], Awaitable[Clock | None]]] = {
        "Postgres": lambda: _postgres(settings),
        "Redis": lambda: _redis(settings),
        "Supabase": lambda: _supabase(settings),
    }
    answers = await asyncio.gather(*(ask() for ask in asked.values()))
    clocks = [one for one in answers if one is not None]
    if not clocks:
        return [Finding("clocks", "skipped", "nobody can be asked for the time")]
    return judge_clocks(clocks)


def judge_clocks(clocks: Sequence[Clock]) -> list[Finding]:
    """Say which clocks are wrong; where all others agree against ours, that it is ours."""
    wrong = [one for one in clocks if abs(one.ahead) > NOTICED_SECONDS]
    if not wrong:
        names = ", ".join(one.name for one in clocks)
        return [Finding("clocks", "ok", f"those of {names} agree with ours")]
    apart = max(one.ahead for one in clocks) - min(one.ahead for one in clocks)
    if len(wrong) == len(clocks) > 1 and apart < NOTICED_SECONDS:
        return [_finding("this machine's clock", -wrong[0].ahead, "the others'")]
    return [_finding(f"the clock of {one.name}", one.ahead, "this machine's") for one in wrong]


def _finding(what: str, ahead: float, of: str) -> Finding:
    detail = f"{what} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {of}"
    if abs(ahead) > REFUSED_SECONDS:
        return Finding("clocks", "problem", f"{detail}: tokens are refused, and lags are wrong", _SYNC)
    return Finding("clocks", "warning", f"{detail}: lags and waits are shown wrong by as much", _SYNC)


def _compared(name: str, theirs: float, before: float, after: float, *, step: float = 0.0) -> Clock:
    """Compare: they looked at their clock at some time between `before` and `after`, to a `step`."""
    if theirs > after:
        return Clock(name, theirs - after)
    return Clock(name, min(0.0, theirs + step - before))


async def _postgres(settings: Settings) -> Clock | None:
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace check", size=1)
    try:
        async with engine.connect() as connection:
            await connection.execute(_NOW)  # the first one is prepared, which takes a while
            before = time.time()
            theirs = float((await connection.execute(_NOW)).scalar_one())
            return _compared("Postgres", theirs, before, time.time())
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        return None
    finally:
        await engine.dispose()


async def _redis(settings: Settings) -> Clock | None:
    try:
        pool = connection_pool(settings.redis_url.get_secret_value(), retries=0)
        async with Redis.from_pool(pool) as client:
            await client.ping()
            before = time.time()
            seconds, micro = await client.time()
            return _compared("Redis", seconds + micro / 1_000_000, before, time.time())
    except (RedisError, OSError, ValueError):
        return None


async def _supabase(settings: Settings) -> Clock | None:
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT) as client:
            before = time.time()
            answer = await client.get(f"{settings.supabase_url}/auth/v1/health")
            after = time.time()
        moment = email.utils.parsedate_to_datetime(answer.headers["date"])
    except (httpx.HTTPError, KeyError, ValueError):
        return None
    # The header has whole seconds, and a cache in between may have kept it for some.
    age = answer.headers.get("age", "0")
    kept = float(age) if age.isdecimal() else 0.0
    return _compared("Supabase", moment.timestamp() + kept, before, after, step=1.0)
