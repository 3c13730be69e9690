"""The demo's own connections to its database, with types; the driver has none.

The daemon does not use this: it works through SQLAlchemy.
"""

from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs] # there are none

# The last one comes where the connection breaks between two messages of a statement.
GONE: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What the driver raises when the database goes away, among other things."""


class Connection(Protocol):
    """The part of asyncpg's connection that the demo uses."""

    async def execute(self, query: str, *values: object) -> str:
        """Run a statement, or without values several."""
        ...

    async def fetch(self, query: str, *values: object) -> list[Any]:
        """Return all rows."""
        ...

    async def fetchrow(self, query: str, *values: object) -> Any:  # noqa: ANN401 - a row of anything
        """Return the first row."""
        ...

    async def fetchval(self, query: str, *values: object) -> Any:  # noqa: ANN401 - as above
        """Return the first value of the first row."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """Open a transaction."""
        ...

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as asyncpg has it
        """Close it."""
        ...


async def connect(url: str) -> Connection:
    """Open a connection."""
    driver = cast("Any", asyncpg)
    return cast("Connection", await driver.connect(url))


async def execute(url: str, statements: str) -> None:
    """Run statements on a connection of their own."""
    db = await connect(url)
    try:
        await db.execute(statements)
    finally:
        await db.close()
