"""Connections to Redis, made prompt, and arq's Redis client, made patient.

redis-py turns the event loop several times for each command before it waits for the answer; our connections
do not. arq's worker ends when Redis is away for a moment, and looks for jobs twice a second; this client
waits for Redis instead of failing, and lets arq's poll wait for a wake-up. Nothing here knows of lanes or
handlers.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Self

import msgspec
import structlog
from arq.connections import ArqRedis, RedisSettings
from arq.utils import timestamp_ms
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    BusyLoadingError,
    RedisError,
    ResponseError,
    WatchError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from config.addresses import Sentinels, sentinels

log = structlog.get_logger(__name__)

SENTINEL_SECONDS = 1.0
"""One that does not answer is passed over for the next."""
IDLE_POLL_SECONDS = 0.5
"""arq's own default: how long a poll waits when nothing rings."""
AWAY = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, OSError)
REFUSALS = ("OOM", "MISCONF", "READONLY", "LOADING", "BUSY ", "NOREPLICAS", "MASTERDOWN", "TRYAGAIN")
MOST_WAIT_SECONDS = 2.0


def refuses_for_now(error: Exception) -> bool:
    """Tell a Redis that is away or cannot write at present from one that finds the command wrong."""
    if not isinstance(error, ResponseError):
        return isinstance(error, AWAY)
    # redis-py cuts the code off where it has a class of its own for it, and a script puts words before it.
    name, message = type(error).__name__, str(error)
    return (
        name in ("OutOfMemoryError", "ReadOnlyError", "MasterDownError")
        or message.startswith(REFUSALS)
        or "command not allowed when used memory" in message
    )


def is_full(error: Exception) -> bool:
    """Tell whether Redis refuses because it has no memory left for what it was to take."""
    return type(error).__name__ == "OutOfMemoryError" or "command not allowed when used memory" in str(error)


_SMALL = 1 << 16
"""Bytes of a command that are written without looking whether the socket takes them."""


class _Prompt(AbstractConnection):
    """Sends a command without a task and a timer of its own: a small one only goes into a buffer.

    A server that does not take it does not answer it either, and for the answer there is a time limit.
    """

    async def send_packed_command(
        self,
        command: bytes | str | Iterable[bytes],
        check_health: bool = True,  # noqa: FBT001, FBT002 - as redis-py has it
    ) -> None:
        writer = self._writer
        if (
            isinstance(command, list)
            and writer is not None
            and not self._is_due
            and not self.is_stale
            and writer.transport.get_write_buffer_size() == 0
            and sum(map(len, command)) <= _SMALL
        ):
            writer.writelines(command)
        else:
            await super().send_packed_command(command, check_health)

    @property
    def _is_due(self) -> bool:
        """It was silent for so long that it is to be asked whether it lives."""
        return bool(self.health_check_interval) and (
            asyncio.get_running_loop().time() > self.next_health_check
        )

    @property
    def is_stale(self) -> bool:
        """The server has closed it, or has said something that nobody asked for."""
        reader, writer = self._reader, self._writer
        return (
            reader is None
            or writer is None
            or writer.transport.is_closing()
            or reader.at_eof()
            or bool(reader._buffer)  # type: ignore[attr-defined] # noqa: SLF001 - asked nowhere else
        )


class _Pool(ConnectionPool):
    """Gives out a connection after a look at it; redis-py tries to read from each one first."""

    # Which class it is depends on the URL: TCP, TLS or a Unix socket, and whether sentinels are asked.
    def made_prompt(self) -> Self:
        """Let its connections be prompt."""
        self.connection_class = type("Connection", (_Prompt, self.connection_class), {})
        return self

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        await connection.connect()  # type: ignore[no-untyped-call] # redis-py's own
        if not isinstance(connection, _Prompt) or connection.is_stale:
            await super().ensure_connection(connection)


class _SentinelPool(_Pool, SentinelConnectionPool):
    """Asks the sentinels for the master before each new connection."""


def _secured(url: str) -> dict[str, Any]:
    """Say what TLS is to see to besides: that the server is the one that the URL names."""
    if not url.startswith("rediss:") or "ssl_check_hostname=" in url or "ssl_cert_reqs=none" in url:
        return {}
    return {"ssl_check_hostname": True}


def _of_sentinels(found: Sentinels, options: dict[str, Any]) -> ConnectionPool:
    """Make a pool of connections to whichever server is the master."""
    named = {**parse_url(found.master), **_secured(found.master)}
    secured = named.pop("connection_class", None) is not None
    for of_master in ("host", "port"):
        named.pop(of_master, None)
    tls = {name: value for name, value in named.items() if name.startswith("ssl_")}
    manager = Sentinel(  # type: ignore[no-untyped-call] # redis-py's own
        found.hosts,
        sentinel_kwargs={
            "socket_connect_timeout": SENTINEL_SECONDS,
            "socket_timeout": SENTINEL_SECONDS,
            "username": found.username,
            "password": found.password,
            **({"ssl": True, **tls} if secured else {}),
        },
    )
    pool = _SentinelPool(found.service, manager, ssl=secured, **{**options, **named})  # type: ignore[no-untyped-call] # as above
    return pool.made_prompt()


def connection_pool(url: str, *, retries: int = 3) -> "ConnectionPool":
    """Make a pool of connections to Redis.

    Args:
        url: `redis://`, `rediss://`, `unix://`, or that of sentinels; see config/addresses.py.
        retries: attempts after a lost connection before the command fails.
    """
    # A Unix socket has no peer that could vanish without a word, and redis-py knows no such option for it.
    kept_alive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    options: dict[str, Any] = {
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
        "retry_on_error": [RedisConnectionError, RedisTimeoutError],
        "socket_connect_timeout": 5,
        "socket_timeout": 10,
        "health_check_interval": 15,
        **kept_alive,
    }
    if (found := sentinels(url)) is not None:
        return _of_sentinels(found, options)
    return _Pool.from_url(url, **_secured(url), **options).made_prompt()


def arq_settings(url: str) -> RedisSettings:
    """Say the same in arq's words: only `arq --check` opens a connection of its own."""
    found = sentinels(url)
    server = url if found is None else found.master
    made = RedisSettings.from_dsn(server)
    named = {} if server.startswith("unix:") else {**parse_url(server), **_secured(server)}
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"):
        if name in named:
            setattr(made, name, named[name])
    if found is not None:
        made.host, made.sentinel, made.sentinel_master = list(found.hosts), True, found.service
    return made


def encode_job(value: dict[str, Any]) -> bytes:
    """Write an arq job as JSON: a queue that others can write to must not hold pickles."""
    return msgspec.json.encode(value, enc_hook=str)


def decode_job(value: bytes) -> dict[str, Any]:
    """Read an arq job."""
    decoded: dict[str, Any] = msgspec.json.decode(value)
    return decoded


class _PatientPipeline(Pipeline):
    """A transaction that outlives a lost connection.

    What it watches is watched again. Where something had been read by then, and where EXEC itself was lost,
    it counts as a lost race, because nobody knows what happened meanwhile. Both of arq's transactions take
    that in their stride.
    """

    patience: "PatientRedis"
    _watched: tuple[Any, ...] = ()
    _has_read = False
    _is_stale = False
    """Something was read before the connection was lost, and may have changed unseen since."""

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        while True:
            try:
                # After a reset redis-py only queues commands, and answers with the pipeline itself, until
                # something is watched again.
                if self._watched and not self.watching:
                    await super().immediate_execute_command("WATCH", *self._watched)  # type: ignore[no-untyped-call] # redis-py's own
                answer = await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call] # as above
            except (RedisError, OSError) as error:
                if not isinstance(error, WatchError) and not refuses_for_now(error):
                    raise
                await self.patience.hold_on(error)
                await self.reset()  # type: ignore[no-untyped-call] # as above
                self._is_stale = self._has_read
            else:
                if args[0] == "WATCH":
                    self._watched = (*self._watched, *args[1:])
                else:
                    self._has_read = True
                return answer

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as redis-py has it
        watching = self.watching
        commands = list(self.command_stack)
        if self._is_stale:
            await self.reset()  # type: ignore[no-untyped-call] # as above
            raise WatchError("the connection was lost after something was read")
        while True:
            try:
                return await super().execute(raise_on_error)
            except (RedisError, OSError) as error:
                if not refuses_for_now(error):
                    raise
                await self.patience.hold_on(error)
                if watching:
                    raise WatchError("the connection was lost") from error
                await self.reset()  # type: ignore[no-untyped-call] # as above
                self.command_stack = commands[:]


class PatientRedis(ArqRedis):
    """What arq's worker talks to Redis through."""

    def __init__(self, url: str, *, queue: str) -> None:
        super().__init__(
            connection_pool(url, retries=1),
            job_serializer=encode_job,
            job_deserializer=decode_job,
            default_queue_name=queue,
        )
        self.rung: asyncio.Event | None = None
        """Set when the queue may have a job; polls wait for it. None: they do not wait."""
        self.stopping = False
        self.waits = ""
        """Why Redis cannot be used; nothing where it can."""

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _PatientPipeline:  # noqa: FBT001, FBT002 - as redis-py has it
        """Make a pipeline that waits for Redis."""
        pipe = _PatientPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipe.patience = self
        return pipe

    async def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        """Run a command, waiting for Redis as long as it takes."""
        return await self._patiently(lambda: super(PatientRedis, self).execute_command(*args, **options))  # type: ignore[no-untyped-call] # redis-py's own

    async def zrangebyscore(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        """Look for jobs, as arq's poll does: at once where one is announced, else twice a second.

        Args:
            args: for redis-py.
            options: for redis-py; `max` is up to which time (Unix, ms) jobs are due.
        """
        if self.rung is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_POLL_SECONDS):
                    await self.rung.wait()
            self.rung.clear()
            # arq took the time before it waited here: the very job that rang would not be due yet.
            options["max"] = timestamp_ms()
        if self.stopping:
            return []
        return await super().zrangebyscore(*args, **options)

    async def _patiently(self, command: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as redis-py has it
        while True:
            try:
                answer = await command()
            except (RedisError, OSError) as error:
                if not refuses_for_now(error):
                    raise
                if self.stopping:
                    return None
                await self.hold_on(error)
            else:
                self._back()
                return answer

    async def hold_on(self, error: Exception) -> None:
        """Wait a little because Redis is away or refuses; says so once."""
        if self.stopping and isinstance(error, RedisError):
            raise error
        if not self.waits:
            self.waits = "REDIS_URL cannot be reached"
            log.warning("waiting for Redis", reason=self.waits, error_class=type(error).__name__)
        await asyncio.sleep(MOST_WAIT_SECONDS / 4)

    def _back(self) -> None:
        if self.waits:
            log.info("Redis is back")
            self.waits = ""
