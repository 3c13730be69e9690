"""The servers of the suite: one embedded Postgres, in it a database per scenario, on it a stand-in.

The one place that knows how a stand-in is started; the player sees its address only.
"""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from standin import Behaviour, Standin
from standin.embedded import EmbeddedPostgres, bootstrap_supabase
from tests.conformance.player import Server

JWT_SECRET = "the secret of a conformance suite, long enough for HS256"
_TEMPLATE = "conformance_template"
_numbers = itertools.count(1)


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run one Postgres with an empty Supabase project as template."""
    # Decoding sees what is flushed: with an asynchronous commit each change would wait for the WAL writer.
    async with EmbeddedPostgres(folder, settings={"synchronous_commit": "on"}) as postgres:
        await _execute(postgres.dsn(), f"create database {_TEMPLATE}")
        await bootstrap_supabase(postgres.dsn(_TEMPLATE))
        yield postgres


@asynccontextmanager
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """Make a fresh project in a database of its own and drop it afterwards; yields its URL."""
    name = f"conformance_{next(_numbers)}"
    await _execute(postgres.dsn(), f"create database {name} template {_TEMPLATE}")
    try:
        yield postgres.dsn(name)
    finally:
        await _execute(postgres.dsn(), f"drop database {name} with (force)")


async def _execute(url: str, statement: str) -> None:
    session = await asyncpg.connect(url)
    try:
        await session.execute(statement)
    finally:
        await session.close()


@asynccontextmanager
async def serving(
    database_url: str, settings: Mapping[str, Any] | None = None, faults: Mapping[str, Any] | None = None
) -> AsyncIterator[Server]:
    """Run a stand-in that looks at the publication only when told to; `settings` are those of `Behaviour`."""
    # Never by itself: the real server looks every 60 s, at moments that no scenario can foresee.
    behaviour = Behaviour(**{"publication_check_interval": 86400.0, **(settings or {})})
    async with Standin(database_url, jwt_secret=JWT_SECRET, behaviour=behaviour) as standin:
        for switch, value in (faults or {}).items():
            setattr(standin.faults, switch, value)
        yield Server(
            url=standin.realtime_url.removesuffix("/realtime/v1"),
            database_url=database_url,
            jwt_secret=JWT_SECRET,
            look_at_publication=lambda: _make_due(standin),
        )


def _make_due(standin: Standin) -> None:
    """Let the next poll look at the publication, as if the interval had passed."""
    standin._feed._last_check = float("-inf")
