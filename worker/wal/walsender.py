"""A conversation with a walsender: the streaming replication protocol on an asyncio transport.

asyncpg connects and authenticates, so that one URL means the same everywhere; then this protocol takes its
transport over. psycopg2, which can stream too, is not used: on a keepalive it moves the flush position it
reports on its own, also past transactions that nobody has applied yet.

It knows messages and positions of the stream, not what is in them.
"""

import asyncio
import contextlib
import struct
import time
from collections import deque
from typing import Any, Final, NamedTuple, Self

import asyncpg
import structlog

from worker.wal.failures import NotPermittedError, ReadingLostError, WalError, failure

log = structlog.get_logger(__name__)

SENDER_TIMEOUT_SECONDS: Final = 5
"""After so long without a word from us the server lets go of the slot; the next listener need not wait."""

# How values are written, whatever the server, the database or the user is set to.
TEXT_FORM: Final = {
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
}
_SESSION: Final = {
    "replication": "database",
    "application_name": "tailrace log",
    "wal_sender_timeout": f"{SENDER_TIMEOUT_SECONDS}s",
    **TEXT_FORM,
}
_CONNECT_SECONDS: Final = 10.0
_HIGH_WATER: Final = 1 << 20
"""Bytes that may wait in memory, unless a single message is larger."""
_UNIX_EPOCH: Final = 946_684_800  # 2000-01-01
_LENGTH: Final = struct.Struct(">I")
_XLOG_DATA: Final = struct.Struct(">QQq")
_KEEPALIVE: Final = struct.Struct(">QqB")
_STATUS: Final = struct.Struct(">cIcQQQqB")
_HEADER, _DATA_HEADER = 5, 25


class Data(NamedTuple):
    """One message of the output plugin."""

    payload: bytes


class Keepalive(NamedTuple):
    """All that was to be sent below an LSN has been sent; in order with the data."""

    wal_end: int
    wants_reply: bool


class Walsender(asyncio.Protocol):
    """One replication connection. Not for use by two tasks at once."""

    def __init__(self, connection: Any, doing: str) -> None:  # noqa: ANN401 - asyncpg has no types
        self._connection = connection
        self._transport: asyncio.Transport = connection._transport  # noqa: SLF001 - taken over, see above
        self._doing = doing
        self._buffer = bytearray()
        self._at = 0
        self._paused = False
        self._copying = False
        self._ended: WalError | None = None
        self._gone = asyncio.get_running_loop().create_future()
        self._news: asyncio.Future[None] | None = None
        self._ready: deque[Data | Keepalive] = deque()
        self.heard = time.monotonic()
        """When the server was last heard."""
        self._transport.set_protocol(self)

    @classmethod
    async def connect(cls, url: str) -> Self:
        """Connect.

        Args:
            url: of a direct connection to the database, as for asyncpg.

        Raises:
            NotPermittedError: the user may not replicate, or what answers is a pooler.
            ReadingLostError: the server cannot be reached.
        """
        doing = "a replication connection cannot be had"
        try:
            connection = await asyncpg.connect(url, timeout=_CONNECT_SECONDS, server_settings=_SESSION)
        except asyncpg.PostgresError as error:
            # Poolers refuse the parameter `replication` with 08P01.
            if error.sqlstate == "08P01":
                raise NotPermittedError(f"{doing}: {error} (a pooler?)") from None
            raise failure(error.sqlstate, str(error), doing) from None
        except (OSError, TimeoutError, asyncpg.InterfaceError) as error:
            raise ReadingLostError(f"{doing}: {type(error).__name__}: {error}") from None
        return cls(connection, "the log's stream ended")

    async def start(self, slot: str, publication: str) -> None:
        """Start streaming from where the slot stands.

        Raises:
            WalError: refused, with the kind that says why.
        """
        quoted = '"' + publication.replace('"', '""') + '"'
        names = quoted.replace("'", "''")
        command = (
            f'START_REPLICATION SLOT "{slot}" LOGICAL 0/0'
            f" (\"proto_version\" '1', \"publication_names\" '{names}', \"messages\" 'true')"
        ).encode()
        self._transport.write(b"Q" + _LENGTH.pack(len(command) + 5) + command + b"\0")
        while not self._copying:
            await self.wait()

    def next(self) -> Data | Keepalive | None:
        """Give the next message, or None if none is there yet."""
        if not self._ready:
            self._parse()
        return self._ready.popleft() if self._ready else None

    async def wait(self) -> None:
        """Wait until more may be there.

        Raises:
            WalError: nothing more will come.
        """
        if self._ready:
            return
        self._parse()
        if self._ready:
            return
        if self._ended is not None:
            raise self._ended
        self._flow()
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    @property
    def starving(self) -> bool:
        """Reading goes on, so that silence is the server's."""
        return not self._paused

    def report(self, *, seen: int, flushed: int, ask: bool) -> None:
        """Report positions; may be called whether or not anybody reads.

        Args:
            seen: LSN up to which the log has come here.
            flushed: LSN to which the slot may move; 0 leaves it.
            ask: for a keepalive in return.
        """
        if self._ended is not None or not self._copying:
            return
        now = int((time.time() - _UNIX_EPOCH) * 1_000_000)
        length = _STATUS.size - 1
        self._transport.write(_STATUS.pack(b"d", length, b"r", seen, flushed, flushed, now, ask))

    async def close(self) -> None:
        """Close the connection; the server lets go of the slot as soon as it notices."""
        # Also when the transport is gone: asyncpg does not know that, and would complain of a leak. On uvloop
        # its word of farewell is an error then: there is nobody left to say it to.
        with contextlib.suppress(RuntimeError):
            self._connection.terminate()
        await asyncio.shield(self._gone)

    def give_up(self, reason: WalError) -> None:
        """End the connection from this side; whoever waits is told the reason."""
        self._ended = self._ended or reason
        self._transport.abort()

    # What follows is called by the event loop.

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        self.heard = time.monotonic()
        self._buffer += data
        self._flow()
        self._wake()

    def eof_received(self) -> None:
        """Note that the server has closed its side."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        reason = "the server closed the connection" if exc is None else f"{type(exc).__name__}: {exc}"
        self._ended = self._ended or ReadingLostError(f"{self._doing}: {reason}")
        if not self._gone.done():
            self._gone.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _flow(self) -> None:
        """Stop the server while much is waiting; go on when it is read. Never in the midst of one message."""
        waiting = len(self._buffer) - self._at
        full = waiting >= _HIGH_WATER and waiting >= self._first_length()
        if full != self._paused and not self._gone.done() and not self._transport.is_closing():
            self._paused = full
            if full:
                self._transport.pause_reading()
            else:
                self.heard = time.monotonic()
                self._transport.resume_reading()

    def _first_length(self) -> int:
        if len(self._buffer) - self._at < _HEADER:
            return _HEADER
        length: int = _LENGTH.unpack_from(self._buffer, self._at + 1)[0]
        return length + 1

    def _parse(self, limit: int = 256) -> None:
        """Read messages out of the buffer."""
        buffer, at, end = self._buffer, self._at, len(self._buffer)
        ready = self._ready
        while limit and end - at >= _HEADER:
            stop = at + 1 + _LENGTH.unpack_from(buffer, at + 1)[0]
            if stop > end:
                break
            kind = buffer[at]
            if kind == _COPY_DATA and buffer[at + _HEADER] == _XLOG:
                ready.append(Data(bytes(memoryview(buffer)[at + _HEADER + _DATA_HEADER : stop])))
                limit -= 1
            else:
                self._other(kind, bytes(buffer[at + _HEADER : stop]))
            at = stop
        # Cut rarely: every cut moves what is behind it.
        if at == end:
            buffer.clear()
            at = 0
        elif at >= _HIGH_WATER:
            del buffer[:at]
            at = 0
        self._at = at
        self._flow()

    def _other(self, kind: int, body: bytes) -> None:
        if kind == _COPY_DATA:
            wal_end, _, wants_reply = _KEEPALIVE.unpack_from(body, 1)
            self._ready.append(Keepalive(wal_end, bool(wants_reply)))
        elif kind == _COPY_BOTH:
            self._copying = True
        elif kind == _ERROR:
            fields = _fields(body)
            self._ended = failure(fields.get("C"), fields.get("M", ""), self._doing)
            self._transport.close()
        elif kind == _NOTICE:
            fields = _fields(body)
            log.warning("the walsender says", message=fields.get("M"), sqlstate=fields.get("C"))
        elif kind in (_COPY_DONE, _COMPLETE):
            self._ended = ReadingLostError(f"{self._doing}: the server is shutting down")
            self._transport.close()
        # ParameterStatus and ReadyForQuery say nothing that matters here.


_COPY_DATA, _COPY_BOTH, _COPY_DONE, _COMPLETE, _ERROR, _NOTICE = b"dWcCEN"
_XLOG: Final = ord("w")


def _fields(body: bytes) -> dict[str, str]:
    """Read the fields of an error or notice; the message is the server's, without row values."""
    parts = body.split(b"\0")
    return {chr(part[0]): part[1:].decode("utf-8", "replace") for part in parts if part}
