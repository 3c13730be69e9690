"""What all of the glue shares: payloads as the Realtime client hands them over, and the job itself."""

import os
import sys
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.workloads import SINGLE

_STATEMENT: Final = text(SINGLE.format(id=":id", customer=":customer", status=":status", amount=":amount"))
_TYPES: Final = {
    "id": "int8",
    "customer_id": "int8",
    "status": "text",
    "amount": "numeric",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
}

JOBS_AT_ONCE: Final = 50
"""Of every runner that is tuned; as many connections, so that no job waits for one."""


def payload(number: int) -> dict[str, Any]:
    """Make what Realtime says of the insert of a row of the backlog."""
    return {
        "schema": "public",
        "table": "orders",
        "type": "INSERT",
        "commit_timestamp": "2026-01-02T03:04:05.678Z",
        "columns": [{"name": name, "type": kind} for name, kind in _TYPES.items()],
        "record": {
            "id": number + 1,
            "customer_id": 1 + number % 200,
            "status": "new",
            "amount": number % 50_000 / 100,
            "created_at": "2026-01-02T03:04:05.678901+00:00",
            "updated_at": None,
        },
        "errors": None,
    }


class Database:
    """The engine of one process, made when it is first used: in the loop of the runner."""

    def __init__(self, connections: int | None = None) -> None:
        self._connections = connections
        self._sessions: async_sessionmaker[AsyncSession] | None = None

    async def copy(self, data: dict[str, Any]) -> None:
        """Do the work of one job: one transaction with one upsert."""
        order = data["record"]
        values = {
            "id": order["id"],
            "customer": order["customer_id"],
            "status": order["status"],
            "amount": Decimal(str(order["amount"])),
        }
        async with self._opened().begin() as session:
            await session.execute(_STATEMENT, values)

    def _opened(self) -> async_sessionmaker[AsyncSession]:
        if self._sessions is None:
            url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://", 1)
            size = {} if self._connections is None else {"pool_size": self._connections}
            self._sessions = async_sessionmaker(create_async_engine(url, **size))
        return self._sessions


def asked() -> int:
    """Read from the command line how many jobs are to be enqueued."""
    return int(sys.argv[1])
