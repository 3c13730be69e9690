"""The way to Postgres: one engine per process, made from the settings.

It decides how connections are made and what is worth waiting for. It holds no SQL of the mechanism.
"""

import asyncio
import errno
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, NoReturn

import asyncpg
import structlog
from sqlalchemy import Connection, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

from migrations import HEAD
from worker.connecting import connection_of
from worker.pooling import Pooling, pooling_of

log = structlog.get_logger(__name__)

DATABASE_ERRORS = (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What a database may raise. Why it refuses a connection, SQLAlchemy hands on as the driver says it."""
PING_AFTER_SECONDS = 10.0
"""A connection that has rested so long is asked whether it lives; before each use it would cost too much."""

_LOST_SQLSTATES = ("08", "57P", "53300", "58030", "25006", "25P03", "25P04")


def make_engine(url: str, *, name: str, size: int = 10) -> AsyncEngine:
    """Make the engine of one process.

    Args:
        url: `postgresql://…` or `postgres://…`, direct or through a pooler.
        name: what `pg_stat_activity` shows as application name.
        size: connections at most.

    Raises:
        ConfigurationError: a parameter of the URL makes no sense, or a file it names cannot be read.
    """
    address, connect = connection_of(url, name)
    engine = create_async_engine(
        address,
        connect_args=connect | {"connection_class": _Connection},
        pool_size=size,
        max_overflow=0,
        pool_recycle=1800,
        pool_use_lifo=True,
        hide_parameters=True,  # row values must not reach a log by way of an error message
    )
    event.listen(engine.sync_engine, "connect", _keep_alive)
    _send_savepoints_plainly(engine)
    _suit_the_pooler(engine)
    _ping_the_rested(engine)
    return engine


@asynccontextmanager
async def singly(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Lend a connection on which each statement is a transaction of its own.

    That saves the round trips of BEGIN and COMMIT, two of three where there is but one. What must be seen or
    written together needs a transaction.
    """
    async with engine.connect() as connection:
        yield await connection.execution_options(isolation_level="AUTOCOMMIT")


class _Connection(asyncpg.Connection):  # type: ignore[misc] # asyncpg has no types
    """A connection that asks no catalogue for what another one of this process has learnt of built-in types.

    asyncpg knows none of the arrays. It would ask for each of them, on each connection and with a query that
    takes ten milliseconds, when a statement first uses it: most of what a new pool costs.
    """

    __slots__ = ()

    async def _introspect_types(self, typeoids: Collection[int], timeout: float | None) -> tuple[Any, Any]:  # noqa: ASYNC109 - asyncpg's signature
        wanted = frozenset(typeoids)
        if (rows := _BUILT_IN_TYPES.get(wanted)) is not None:
            return rows, _NOT_ASKED
        rows, statement = await super()._introspect_types(typeoids, timeout)
        if max((row["oid"] for row in rows), default=_FIRST_OID_OF_A_DATABASE) < _FIRST_OID_OF_A_DATABASE:
            _BUILT_IN_TYPES[wanted] = rows
        return rows, statement


class _NotAsked(NamedTuple):
    """Stands for the statement that was not needed."""

    name: str


_NOT_ASKED = _NotAsked("none")
_BUILT_IN_TYPES: dict[frozenset[int], Any] = {}
_FIRST_OID_OF_A_DATABASE = 10_000
"""Below it a number means the same type in every Postgres."""


def _send_savepoints_plainly(engine: AsyncEngine) -> None:
    """Have savepoints set, released and rolled back in one round trip each.

    Each has a name of its own. SQLAlchemy would have every such statement prepared before it is run, and the
    many that are never used again would drive those that are out of the connection's cache.
    """
    dialect: Any = engine.sync_engine.dialect

    async def send(adapter: Any, statement: str) -> None:  # noqa: ANN401 - SQLAlchemy's face of asyncpg
        async with adapter._execute_mutex:  # noqa: SLF001 - what SQLAlchemy does before a statement, as below
            if adapter._transaction is None:  # noqa: SLF001
                await adapter._start_transaction()  # noqa: SLF001
            await adapter.driver_connection.execute(statement)

    def sender(words: str) -> Callable[[Connection, str], None]:
        def run_with(connection: Connection, name: str) -> None:
            try:
                await_only(send(connection.connection.dbapi_connection, f"{words} {name}"))
            except Exception as error:  # noqa: BLE001 - translated, and raised again
                _as_sqlalchemy(connection, error)

        return run_with

    dialect.do_savepoint = sender("savepoint")
    dialect.do_rollback_to_savepoint = sender("rollback to savepoint")
    dialect.do_release_savepoint = sender("release savepoint")


def _as_sqlalchemy(connection: Any, error: Exception) -> NoReturn:  # noqa: ANN401 - private parts of SQLAlchemy's
    """Raise an error of the driver as SQLAlchemy would, and let it see whether the connection is lost."""
    try:
        connection.connection.dbapi_connection._handle_exception(error)  # noqa: SLF001
    except Exception as translated:  # noqa: BLE001 - as above
        connection._handle_dbapi_exception(translated, None, None, None, None)  # noqa: SLF001
    raise error


def _suit_the_pooler(engine: AsyncEngine) -> None:
    """Before the first connection find out what stands between, where the URL does not tell; then suit it."""
    known: list[Pooling] = []
    looking = asyncio.Lock()

    async def look(connect: Callable[[], Awaitable[asyncpg.Connection]]) -> Pooling:
        async with looking:
            if not known:
                known.append(await pooling_of(connect))
        return known[0]

    def suit(_dialect: object, _record: object, positional: list[Any], named: dict[str, Any]) -> None:
        if named.get("statement_cache_size") == 0:
            return  # the URL has told

        async def connect() -> asyncpg.Connection:
            own = {name: value for name, value in named.items() if not name.startswith("prepared_statement")}
            return await asyncpg.connect(*positional, **own | {"statement_cache_size": 0})

        pooling = await_only(look(connect))
        if pooling is Pooling.TRANSACTION:
            named |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
        elif pooling is Pooling.NONE:
            # Most statements are short: to compile them takes longer than to run them. A pooler may refuse
            # the parameter, or hand the setting on to somebody else.
            named["server_settings"] = {"jit": "off"} | named["server_settings"]

    event.listen(engine.sync_engine, "do_connect", suit)


def _ping_the_rested(engine: AsyncEngine) -> None:
    """Replace connections that have died while nobody used them, before anybody is given one."""

    def rests(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = time.monotonic()

    def wakes(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        since = record.info.get("rests_since")
        if since is None or time.monotonic() - since < PING_AFTER_SECONDS:
            return
        try:
            engine.sync_engine.dialect.do_ping(connection)
        except engine.sync_engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # the pool opens another one

    event.listen(engine.sync_engine, "checkin", rests)
    event.listen(engine.sync_engine, "checkout", wakes)


def _keep_alive(connection: Any, _record: object) -> None:  # noqa: ANN401 - SQLAlchemy's face of asyncpg
    """Have the kernel ask an idle peer: a firewall that forgets a connection tells nobody."""
    transport = connection.driver_connection._transport  # noqa: SLF001 - asyncpg gives it out nowhere
    opened = transport.get_extra_info("socket")
    if opened is None or opened.family not in (socket.AF_INET, socket.AF_INET6):
        return
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


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
    innermost = _chain(error)[-1]
    words = next(iter(str(innermost).splitlines()), "")
    for one in _chain(error):
        state = getattr(one, "sqlstate", None)
        if state in _STATES:
            return _STATES[state].format(words=words)
        if state == "42P01" and "tailrace." in str(one):
            return "tailrace's tables are missing: run `python -m worker migrate`"
        if (known := _known_trouble(one)) is not None:
            return known
    return f"Postgres cannot be reached ({type(innermost).__name__}: {words})"


_STATES = {
    "28P01": "Postgres refuses the user or password of DATABASE_URL",
    "28000": "Postgres refuses the user or password of DATABASE_URL",
    "42501": "the user of DATABASE_URL may not do that ({words}): grant it, or connect as the tables' owner",
    "3D000": "the database named in DATABASE_URL does not exist",
    "3F000": "schema tailrace is missing: run `python -m worker migrate`",
}
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
# What people meet with Supabase's addresses and poolers, and what helps.
_TROUBLES: tuple[tuple[Callable[[BaseException, str], bool], str], ...] = (
    (
        lambda error, _: isinstance(error, PoolTimeoutError),
        "all connections of this process are in use, and none became free in time",
    ),
    (
        lambda error, words: getattr(error, "sqlstate", None) == "53300" or "max clients" in words,
        (
            "Postgres or its pooler gives no more connections: run fewer processes, lower WORKER_LANES,"
            " or raise the pool size of the project"
        ),
    ),
    (
        lambda _, words: "tenant" in words and "not found" in words,
        (
            "the pooler knows no such project: it may be paused, the host may be of another region,"
            " or the user of DATABASE_URL is not postgres.<project>"
        ),
    ),
    (
        lambda error, _: isinstance(error, ssl.SSLCertVerificationError),
        "the certificate of Postgres is not by sslrootcert of DATABASE_URL, or is for another host",
    ),
    (
        lambda error, words: isinstance(error, ConnectionError) and "rejected ssl" in words,
        "Postgres offers no TLS, and sslmode of DATABASE_URL demands it",
    ),
    (
        lambda error, _: isinstance(error, socket.gaierror),
        (
            "the host of DATABASE_URL is not known here: the project may be paused, or have an IPv6 address"
            " only, for which the session pooler's address helps"
        ),
    ),
    (
        lambda error, _: isinstance(error, OSError) and error.errno in _UNREACHABLE,
        (
            "the host of DATABASE_URL cannot be reached from this machine's network: a direct address of"
            " Supabase is IPv6 only, so take the session pooler's"
        ),
    ),
)


def _known_trouble(error: BaseException) -> str | None:
    words = str(error).lower()
    return next((told for met, told in _TROUBLES if met(error, words)), None)


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
    except DATABASE_ERRORS as error:  # TimeoutError is an OSError
        return explain(error)
    # A newer revision is an upgrade under way: the new version keeps what the old one needs.
    if revision is None or revision < HEAD:
        return f"tailrace's tables are at {revision}, {HEAD} is needed: run `python -m worker migrate`"
    return None
