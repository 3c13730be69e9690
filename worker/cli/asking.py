"""Asks a running Tailrace for its state: the listener's `/status`, or else the database.

Only reads. The listener is asked first, for it alone knows its connection to the source.
"""

import asyncio
import http.client
from typing import Any

import asyncpg
import orjson
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings
from worker.cli.progress import progress
from worker.database import explain, make_engine
from worker.errors import TailraceError
from worker.fitting import load_handlers
from worker.status import read_status
from worker.verify import verify
from worker.web.serving import Served

_SECONDS = 6  # a little longer than the listener itself takes to say that it cannot tell
_OK = 200


class NobodyAnswers(TailraceError):  # noqa: N818 - says what happened
    """Neither the listener nor the database can be asked; the text says why, in one line."""


def ask_status(settings: Settings) -> dict[str, Any]:
    """Return the state in the shape of `/status`.

    Raises:
        NobodyAnswers: neither the listener nor the database can be asked.
    """
    told = _of_listener(settings.health_host, settings.port)
    if told is not None:
        return told
    try:
        told = asyncio.run(read_status(settings))
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise NobodyAnswers(f"there is no listener on port {settings.port}, and {explain(error)}") from None
    told["reasons"] = [f"no listener answers on {settings.health_host}:{settings.port}", *told["reasons"]]
    return told


def recount(settings: Settings) -> dict[str, Any]:
    """Count again what the counters say; see worker/verify.py for the shape.

    Raises:
        ConfigurationError: the handlers do not fit the database.
        NobodyAnswers: Postgres cannot be asked.
    """
    try:
        return asyncio.run(_recount(settings))
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise NobodyAnswers(explain(error)) from None


async def _recount(settings: Settings) -> dict[str, Any]:
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace verify", size=1)
    try:
        handlers, catalogue = await load_handlers(settings, engine, "proven")
    finally:
        await engine.dispose()
    with progress("counting the log again", "bytes") as tell:
        return (await verify(settings, handlers, catalogue, tell)).told()


def _of_listener(host: str, port: int) -> dict[str, Any] | None:
    """Return what the listener says; None when there is none, or somebody else has the port."""
    if not port:
        return None
    connection = http.client.HTTPConnection(Served(host, port).reachable_host, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/status", headers={"Connection": "close"})
        response = connection.getresponse()
        content = response.read()
        told = orjson.loads(content) if response.status == _OK else None
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError):
        return None
    finally:
        connection.close()
    return told if isinstance(told, dict) and {"delivery", "handlers"} <= told.keys() else None
