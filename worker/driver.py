"""What goes to Postgres by the driver, past SQLAlchemy: the transaction of a pass, and its own statements.

A pass makes a transaction for a handful of statements, hundreds of times a second, and a session's begin,
commit and execute cost several times what the driver's do. A handler gets a session all the same: it is
bound to the connection, and is part of the transaction from its first use. Some of what is used here are
private parts of SQLAlchemy's adapter for asyncpg; test_own_statements.py would tell if they changed.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.database import is_lost


class DrivenSession(AsyncSession):
    """A session in a transaction that the driver has begun; see `transaction`."""

    def __init__(self, connection: AsyncConnection) -> None:
        super().__init__(bind=connection, expire_on_commit=False)
        self._lent = connection
        self.sync_session.begin()

    async def run(self, statement: str, *arguments: object) -> Sequence[asyncpg.Record]:
        """Run a statement in it; see `run`."""
        return await _run(self._lent, statement, *arguments)

    async def invalidate(self) -> None:
        """Close the connection; also where the session has not used it yet."""
        await self.connection()
        await super().invalidate()

    @property
    def _is_used(self) -> bool:
        """SQLAlchemy takes part in the transaction, and has to hear of its end."""
        return self._lent.in_transaction()

    async def _end(self, how: str) -> None:
        adapter = _adapter(self._lent)
        transaction, adapter._transaction = adapter._transaction, None  # noqa: SLF001 - as SQLAlchemy does it
        if transaction is not None:
            await getattr(transaction, how)()

    async def keep(self) -> None:
        """Commit.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError, sqlalchemy.exc.DBAPIError: it failed, or nobody
                knows whether it did.
        """
        if self._is_used or self.new or self.dirty or self.deleted:
            await self.commit()
            return
        try:
            await self._end("commit")
        except Exception as error:
            await _doubt(self._lent, error)
            raise

    async def undo(self) -> None:
        """Roll back; where that cannot be done the connection is closed, which does the same."""
        try:
            if self._is_used:
                await self.rollback()
            else:
                await self._end("rollback")
        except BaseException as error:
            await asyncio.shield(self._lent.invalidate())
            if not isinstance(error, Exception):
                raise

    async def part(self) -> None:
        """Have no more to do with the connection."""
        if self._is_used:
            await asyncio.shield(self.close())
        else:
            self.sync_session.close()


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[DrivenSession]:
    """Begin a transaction; commit it at the end, or roll it back where something is raised.

    Raises:
        asyncpg.PostgresError, asyncpg.InterfaceError, OSError, sqlalchemy.exc.SQLAlchemyError: it is away.
    """
    async with engine.connect() as connection:
        try:
            await _adapter(connection)._start_transaction()  # noqa: SLF001 - SQLAlchemy does so with its first statement
        except BaseException as error:
            if isinstance(error, Exception):
                await _doubt(connection, error)
            else:
                # It may have begun all the same: whoever had the connection next would be a part of it.
                await asyncio.shield(connection.invalidate())
            raise
        session = DrivenSession(connection)
        try:
            try:
                yield session
                await session.keep()
            except BaseException:
                await session.undo()
                raise
        finally:
            await session.part()


async def run(session: AsyncSession, statement: str, *arguments: object) -> Sequence[asyncpg.Record]:
    """Run a statement of our own in the transaction of a session, by the driver; returns its rows.

    For the few statements of every pass. What the session has not flushed is not seen by it.

    Args:
        session: its transaction is begun if need be.
        statement: with `$1`, `$2` and so on.
        arguments: for them.

    Raises:
        asyncpg.PostgresError, asyncpg.InterfaceError, sqlalchemy.exc.DBAPIError: it failed.
    """
    if isinstance(session, DrivenSession):
        return await session.run(statement, *arguments)
    return await _run(await session.connection(), statement, *arguments)


async def _run(connection: AsyncConnection, statement: str, *arguments: object) -> Sequence[asyncpg.Record]:
    adapter = _adapter(connection)
    driver: asyncpg.Connection = adapter.driver_connection
    try:
        async with adapter._execute_mutex:  # noqa: SLF001 - what SQLAlchemy does before a statement, as below
            # It begins a transaction with its own first statement only; ours would be committed at once.
            if adapter._transaction is None:  # noqa: SLF001
                await adapter._start_transaction()  # noqa: SLF001
            return await driver.fetch(statement, *arguments)  # type: ignore[no-any-return] # asyncpg has no types
    except Exception as error:
        await _doubt(connection, error)
        raise


async def _doubt(connection: AsyncConnection, error: Exception) -> None:
    """Let SQLAlchemy find out for itself that a connection is lost: it then doubts the others too."""
    if is_lost(error):
        await connection.execute(text("select 1"))


def _adapter(connection: AsyncConnection) -> Any:  # noqa: ANN401 - SQLAlchemy's face of asyncpg
    pooled: Any = connection.sync_connection
    return pooled.connection.dbapi_connection
