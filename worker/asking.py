"""Asks a running Tailrace for its state: the listener's `/status`, or else the database.

Only reads. The listener is asked first, for it alone knows its connection to the source.
"""

import asyncio
import http.client
import inspect
from typing import Any

import orjson

from config.settings import Settings
from worker.web.serving import Served

_SECONDS = 6  # a little longer than the listener itself takes to say that it cannot tell
_OK = 200


def ask_status(settings: Settings) -> dict[str, Any]:
    """Return the state in the shape of `/status`.

    Raises:
        ConfigurationError: neither the listener nor the database can be asked.
    """
    told = _of_listener(settings.health_host, settings.port)
    if told is not None:
        return told
    from worker.status import read_status  # noqa: PLC0415 - only where there is no listener to ask

    answer = read_status(settings)
    return asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer


def _of_listener(host: str, port: int) -> dict[str, Any] | None:
    """Return what the listener says; None when there is none, or somebody else has the port."""
    if not port:
        return None
    served = Served(host, port)
    connection = http.client.HTTPConnection(served.reachable_host, port, timeout=_SECONDS)
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


async def _awaited(answer: Any) -> dict[str, Any]:  # noqa: ANN401 - an awaitable of whatever kind
    told: dict[str, Any] = await answer
    return told
