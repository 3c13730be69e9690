"""One websocket to Realtime: address, opening, what is sent. The only module that knows `realtime`.

Of the client library we take what holds up: how it makes the address, the message, the join payload and the
names of the protocol. Its loops we do not take: in 2.34 an exception in a callback ends the reader in
silence, five failed reconnects end it for good, a late close removes a live channel, replies to heartbeats
are not looked at, frames over 1 MiB close the socket, 400/401 events are dropped, numerics become floats.
Reading, joining again and the proof of life are in the modules beside this one.
"""

import logging
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from realtime import AsyncRealtimeClient
from realtime.message import Message
from realtime.types import (
    PHOENIX_CHANNEL,
    ChannelEvents,
    PostgresChangesCallback,
    RealtimePostgresChangesListenEvent,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from worker.errors import TailraceError
from worker.realtime.subscription import Join
from worker.realtime.timing import Timing

HEARTBEAT_TOPIC = PHOENIX_CHANNEL

MAX_FRAME = 64 * 1024 * 1024
"""Bytes. Rows are cut at 1 MiB of WAL text, but an unchanged TOAST value of an old row is not counted in
that."""

# Websockets logs the address at debug level, and the key is part of it.
_silent = logging.getLogger("worker.realtime.silent")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False
_silent.setLevel(logging.CRITICAL + 1)


class CannotConnect(TailraceError):  # noqa: N818 - says what happened
    """No websocket could be opened.

    Args:
        reason: in words, with the remedy; holds no secret.
        refused: there is a server, and it says no: trying again soon is of no use.
    """

    def __init__(self, reason: str, *, refused: bool) -> None:
        self.reason = reason
        self.refused = refused
        super().__init__(reason)


class Address:
    """Where Realtime is and with which key one enters.

    Args:
        url: http(s) or ws(s) address, without the final `/websocket`.
        key: the service key. A JWT is sent as `apikey` and as `access_token` of each join; an `sb_…` key,
            which is opaque to Realtime itself, as `apikey` only.

    Raises:
        ValueError: the address is no http(s) or ws(s) address.
    """

    def __init__(self, url: str, key: str) -> None:
        base = url.rstrip("/").removesuffix("/websocket")
        parts = urlsplit(base)
        if parts.scheme not in {"http", "https", "ws", "wss"} or not parts.hostname:
            raise ValueError(
                "Realtime's address must be like wss://<project>.supabase.co/realtime/v1: check REALTIME_URL"
            )
        self.key = key
        self._endpoint = AsyncRealtimeClient(base, key).endpoint_url()
        self.host = parts.hostname
        self.words = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        """The address for people: no key, no user."""

    @property
    def access_token(self) -> str | None:
        """The token that goes into each join."""
        return None if self.key.startswith("sb_") else self.key

    async def open(self, timing: Timing) -> ClientConnection:
        """Open a websocket.

        Raises:
            CannotConnect: with the reason in words.
        """
        try:
            return await _Connect(
                self._endpoint,
                compression=None,
                max_size=MAX_FRAME,
                max_queue=64,
                open_timeout=timing.open,
                close_timeout=timing.close,
                # Our own heartbeats prove the path; a keepalive would also end a socket that we leave unread.
                ping_interval=None,
                # A proxy named in the environment is none for the machine itself.
                proxy=None if self.host in {"localhost", "127.0.0.1", "::1"} else True,
                logger=_silent,
            )
        except InvalidStatus as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise self._unreachable("no answer in time") from None
        except ssl.SSLError as error:
            raise self._unreachable(f"TLS: {error.reason or type(error).__name__}") from None
        except (OSError, InvalidHandshake, InvalidURI, ConnectionClosed, EOFError, ValueError) as error:
            # The text of such errors may quote the address with the key: the kind must do.
            raise self._unreachable(getattr(error, "strerror", None) or type(error).__name__) from None

    def _unreachable(self, why: str) -> CannotConnect:
        return CannotConnect(
            f"Realtime cannot be reached at {self.words} ({why}):"
            " check SUPABASE_URL or REALTIME_URL, and the network",
            refused=False,
        )

    def _refusal(self, error: InvalidStatus) -> CannotConnect:
        status = error.response.status_code
        said = f"{status} {self._explanation(error.response.body or b'')}".strip()
        if status in {401, 403}:
            words = f"Realtime refuses the key ({said}): check SUPABASE_SERVICE_ROLE_KEY"
        elif status == 404:  # noqa: PLR2004 - a status everybody knows
            words = f"there is no Realtime at {self.words} ({said}): check SUPABASE_URL or REALTIME_URL"
        elif status == 429:  # noqa: PLR2004
            words = f"Realtime has no room ({said}): too many connections or joins in this project; waiting"
        elif 300 <= status < 400:  # noqa: PLR2004
            words = (
                f"{self.words} redirects ({said}), and is not followed: put the final address in REALTIME_URL"
            )
        else:
            return CannotConnect(f"Realtime at {self.words} is in trouble ({said}); waiting", refused=False)
        return CannotConnect(words, refused=True)

    def _explanation(self, body: bytes) -> str:
        try:
            said = msgspec.json.decode(body, type=dict[str, Any]).get("error", "")
        except msgspec.DecodeError:
            return ""
        return str(said)[:200].replace(self.key, "…") if self.key else str(said)[:200]

    def join(self, join: Join) -> str:
        """Return the text of a join."""
        bindings = [_binding(schema, table) for schema, table in join.tables]
        payload: dict[str, Any] = {
            "config": {
                "broadcast": {"ack": False, "self": False},
                "presence": {"key": "", "enabled": False},
                "private": False,
                "postgres_changes": bindings,
            }
        }
        if self.access_token is not None:
            payload["access_token"] = self.access_token
        return _text(ChannelEvents.join, join.topic, payload, join.ref, join.ref)


def heartbeat(ref: str) -> str:
    """Return the text of a heartbeat."""
    return _text(ChannelEvents.heartbeat, HEARTBEAT_TOPIC, {}, ref, None)


def _binding(schema: str, table: str) -> dict[str, Any]:
    wanted = RealtimePostgresChangesListenEvent.All
    binding = PostgresChangesCallback(lambda _: None, wanted, table, schema, None).binding_filter
    return {**binding, "event": wanted.value}


def _text(event: ChannelEvents, topic: str, payload: dict[str, Any], ref: str, join_ref: str | None) -> str:
    message = Message(event=event.value, topic=topic, payload=payload, ref=ref, join_ref=join_ref)
    return message.model_dump_json()


class _Connect(connect):
    """Opens a websocket where it was told to, and nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Follow no redirect: the key would go to whoever is named in it."""
        return exc


def closing_words(error: ConnectionClosed) -> str:
    """Say in words how a socket was closed."""
    if error.rcvd is None:
        if error.sent is not None and error.sent.code == 1009:  # noqa: PLR2004 - "message too big"
            return f"a frame over {MAX_FRAME // 1024 // 1024} MiB"
        return "the connection broke off (1006)"
    return f"Realtime closed the connection ({error.rcvd.code})"


def tables_in_words(tables: Sequence[tuple[str, str]], most: int = 5) -> str:
    """Name tables for people, a few of them."""
    names = [f"{schema}.{table}" for schema, table in tables]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
