"""The stand-in as one object: change feed, websocket server and admin, started and stopped together.

It owns the background tasks. It brings no database: see `standin.embedded` and `python -m standin`.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from standin.changes import ChangeFeed, problem_with
from standin.server import tokens
from standin.server.admin import AdminServer
from standin.server.behaviour import Behaviour
from standin.server.counters import Counters
from standin.server.faults import Faults
from standin.server.handshake import GATEWAY_PATH
from standin.server.realtime import RealtimeServer

# The secret that Supabase's own tools use for local development; known to everybody, so of no use elsewhere.
LOCAL_JWT_SECRET = "super-secret-jwt-token-with-at-least-32-characters-long"  # noqa: S105 (public on purpose)
POLL_INTERVAL = 0.02


class StandinError(Exception):
    """The stand-in cannot start; the message is one line that says why and what to do."""


class Standin:
    """A local Supabase Realtime on a Postgres with `wal_level=logical`.

    `async with Standin(database_url) as standin: …`; all addresses are known once it has started.

    Attributes:
        supabase_url: what clients take as the project's URL, `http://127.0.0.1:PORT`.
        realtime_url: the Realtime endpoint below it, `ws://127.0.0.1:PORT/realtime/v1`.
        admin_url: where the fault switches are.
        service_role_key, anon_key: keys signed with the secret.
        faults: the switches, settable; see `standin.server.faults`.
        counters: what was done; `await standin.counters.reach("joins", 1)` waits for it.
    """

    def __init__(
        self,
        database_url: str,
        *,
        jwt_secret: str = LOCAL_JWT_SECRET,
        host: str = "127.0.0.1",
        port: int = 0,
        poll_interval: float = POLL_INTERVAL,
        seed: int | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        if len(jwt_secret.encode()) < tokens.MINIMUM_SECRET_BYTES:
            raise StandinError(
                f"the JWT secret is too short: give at least {tokens.MINIMUM_SECRET_BYTES} bytes"
            )
        self.behaviour = behaviour or Behaviour()
        self._database_url = database_url
        self._secret = jwt_secret
        self._host = host
        self._port = port
        self._realtime = RealtimeServer(secret=jwt_secret, behaviour=self.behaviour, seed=seed)
        self._admin = AdminServer(self._realtime)
        self._feed = ChangeFeed(
            database_url,
            publication=self.behaviour.publication,
            poll_interval=poll_interval,
            max_record_bytes=self.behaviour.max_record_bytes,
            deliver=self._realtime.deliver,
            publication_check_interval=self.behaviour.publication_check_interval,
            on_resubscribed=self._realtime.resubscribed,
            on_resubscribe_failed=self._realtime.not_resubscribed,
        )
        self._polling: asyncio.Task[None] | None = None
        self.service_role_key = tokens.project_key("service_role", jwt_secret)
        self.anon_key = tokens.project_key("anon", jwt_secret)
        self.supabase_url = self.realtime_url = self.admin_url = ""

    @property
    def faults(self) -> Faults:
        """The fault switches."""
        return self._realtime.faults

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._realtime.counters

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin to poll and to listen.

        Raises:
            StandinError: the port is taken, the database is away or not fit.
        """
        await self._examine_database()
        self._polling = asyncio.create_task(self._feed.run(), name="standin change feed")
        try:
            await self._realtime.start(self._host, self._port, self._feed)
            await self._admin.start(self._host)
        except OSError as error:
            await self.stop()
            raise StandinError(
                f"cannot listen on {self._host}:{self._port}: {error.strerror or error};"
                " choose another with --host or --port, or leave the port out for a free one"
            ) from None
        except BaseException:
            await self.stop()
            raise
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self._realtime.port}"
        self.supabase_url = f"http://{address}"
        self.realtime_url = f"ws://{address}{GATEWAY_PATH.removesuffix('/websocket')}"
        self.admin_url = f"http://{host}:{self._admin.port}"

    async def stop(self) -> None:
        """Close all clients with 1012, stop listening and polling; harmless when nothing runs."""
        await self._realtime.stop()
        await self._admin.stop()
        if self._polling is not None:
            polling, self._polling = self._polling, None
            polling.cancel()
            await asyncio.wait({polling})
            if not polling.cancelled() and (error := polling.exception()) is not None:
                raise error

    async def failure(self) -> None:
        """Wait until the change feed ends, which it does only by an error, and raise that."""
        if self._polling is not None:
            await asyncio.shield(self._polling)

    def sign(self, claims: Mapping[str, Any], *, expires_in: float | None = 3600) -> str:
        """A token with these claims; `exp` is `expires_in` seconds from now unless the claims have one.

        `expires_in=None` leaves `exp` out.
        """
        full = dict(claims)
        if expires_in is not None:
            full.setdefault("exp", int(time.time() + expires_in))
        return tokens.sign(full, self._secret)

    async def drop_connections(self, code: int = 1012) -> None:
        """Close every client with this code; 1006 cuts TCP without a close frame."""
        await self._realtime.act({"close": code})

    def expire_tokens(self) -> None:
        """End every channel as if its token had expired just now."""
        self._realtime.expire_tokens()

    def system_error(self, message: str) -> None:
        """Make every subscription fail with this message; the channels stay joined."""
        self._realtime.system_error(message)

    def repeat_subscribed(self) -> None:
        """Tell every channel once more that it is subscribed."""
        self._realtime.repeat_subscribed()

    def late_close(self) -> None:
        """Send every channel the phx_close of an older join."""
        self._realtime.late_close()

    async def _examine_database(self) -> None:
        problem = await problem_with(self._database_url, self.behaviour.publication)
        if problem is not None:
            raise StandinError(f"cannot use the database at {_shown(self._database_url)}: {problem}")


def _shown(database_url: str) -> str:
    """The address without user and password."""
    try:
        parts = urlsplit(database_url)
        port = parts.port or 5432
    except ValueError:
        return "the given URL"
    return f"{parts.hostname}:{port}{parts.path}"
