"""The session that a handler is given: the worker's own, without the means to end its transaction.

The worker commits a handler's writes together with the lane's position; a commit in between would apply
changes twice after a crash, a rollback would lose the position. So the handler gets a second view of the
same session, whose commit, rollback, close and the like are refused. The worker's own session object is
never changed: there is nothing to switch off afterwards, and nothing that could be left on.

Not a sandbox: COMMIT sent as SQL text, or through the driver's connection, is out of reach.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from worker.declarations import Handler
from worker.errors import SessionMisuse


def _refuse(method: str) -> NoReturn:
    raise SessionMisuse(
        f"{method} of a handler's session is refused: the worker commits its writes together with the"
        " lane's position. Just return, or raise; for a part that may fail on its own use"
        " `async with session.begin_nested():`"
    )


class _LentSyncSession(Session):
    """A view of a Session. What is not refused here works on the state they share."""

    def __init__(self, session: Session) -> None:
        # The very dict of the session, not a copy: both see the same transaction, identity map and settings.
        self.__dict__ = session.__dict__

    def commit(self) -> NoReturn:
        _refuse("commit()")

    def rollback(self) -> NoReturn:
        _refuse("rollback()")

    def close(self) -> NoReturn:
        _refuse("close()")

    def reset(self) -> NoReturn:
        _refuse("reset()")

    def invalidate(self) -> NoReturn:
        _refuse("invalidate()")

    def prepare(self) -> NoReturn:
        _refuse("prepare()")

    def get_transaction(self) -> NoReturn:
        # It has a commit() and a rollback() of its own.
        _refuse("get_transaction()")

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - SQLAlchemy's signature
        if not nested:
            _refuse("begin()")
        return super().begin(nested=True)

    def __enter__(self) -> NoReturn:
        _refuse("`with session`, which closes it at its end,")


class _LentSession(AsyncSession):
    """A view of an AsyncSession. Its methods end in those of the lent Session, and are refused there."""

    def __init__(self, session: AsyncSession) -> None:
        self.__dict__ = session.__dict__.copy()
        self.sync_session = self._proxied = _LentSyncSession(session.sync_session)

    async def __aenter__(self) -> NoReturn:
        _refuse("`async with session`, which closes it at its end,")

    @classmethod
    async def close_all(cls) -> NoReturn:
        _refuse("close_all()")


def handler_session(session: AsyncSession) -> AsyncSession:
    """Return a view of the session for a handler: the same transaction, identity map and connection.

    `begin_nested()` is welcome, with its own commit and rollback. Costs two small objects, no I/O.

    Raises (when the handler uses the view):
        SessionMisuse: on commit, rollback, close, reset, invalidate, begin and `async with session`.
    """
    return _LentSession(session)


_ACT = text(
    "select set_config('request.jwt.claims', :claims, true), set_config('request.jwt.claim.sub', :sub, true),"
    " set_config('role', :role, true)"
)
_STOP_ACTING = text(
    "select set_config('role', 'none', true), set_config('request.jwt.claims', '', true),"
    " set_config('request.jwt.claim.sub', '', true)"
)


def _parameters(role: str, claims: Mapping[str, Any]) -> dict[str, str]:
    told = {"role": role} | dict(claims)
    return {"role": role, "claims": msgspec.json.encode(told).decode(), "sub": str(told.get("sub", ""))}


@asynccontextmanager
async def session_as(
    engine: AsyncEngine, role: str, claims: Mapping[str, Any]
) -> AsyncIterator[AsyncSession]:
    """Give a session in which a user's rights hold, for code outside handlers; committed at the end.

    One transaction, for role and claims are local to it: nothing is left to whoever has the connection next,
    also through a transaction pooler. So the session's own commit and rollback are refused: what came after
    them would run with the rights of the engine. Raise, to have everything rolled back.

    Args:
        engine: of a database user that may `set role`.
        role: such as `authenticated`.
        claims: of the user's token, which must have been verified.
    """
    async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
        await session.execute(_ACT, _parameters(role, claims))
        yield handler_session(session)


@asynccontextmanager
async def acting_as(session: AsyncSession, handler: Handler) -> AsyncIterator[None]:
    """Run what is inside as the handler's role, with its claims, under the table's policies.

    Local to the transaction, so that nothing leaks through a pooler, and taken back at the end of the call,
    because the lane's row is the worker's. After a failure the caller's rollback takes it back.
    """
    if handler.role is None:
        yield
        return
    connection = await session.connection()
    await connection.execute(_ACT, _parameters(handler.role, handler.claims or {}))
    yield
    # What the handler left in the unit of work is its writing, under its role.
    await session.flush()
    await connection.execute(_STOP_ACTING)
