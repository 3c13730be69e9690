"""The websocket server: accepts clients, hands the feed's changes to their channels, obeys the faults.

It knows neither Postgres nor HTTP of the admin side.
"""

import asyncio
import logging
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import structlog
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from standin.changes import BadSubscription, Delivery
from standin.server import handshake
from standin.server.behaviour import Behaviour
from standin.server.channel import SUBSCRIBED, Channel, Feed, Surroundings
from standin.server.connection import Connection
from standin.server.counters import Counters
from standin.server.faults import CURRENT, Faults
from standin.server.gate import Gate
from standin.server.rates import RateCounter
from standin.server.session import Session

RESTARTING = 1012
_MAX_MESSAGE_BYTES = 10 * 1024 * 1024
_BREATH = 256
_STALE_REF = "0"
log = structlog.get_logger(__name__)


class RealtimeServer:
    """Realtime's websocket end.

    Attributes:
        faults: the switches, to be read and set.
        counters: what was done.
        port: the TCP port, known after `start`.
    """

    def __init__(self, *, secret: str, behaviour: Behaviour, seed: int | None) -> None:
        self.counters = Counters()
        self.faults = Faults(self._faults_changed)
        self.port = 0
        self._behaviour = behaviour
        self._secret = secret
        self._random = random.Random(seed)  # noqa: S311 (faults want a seed, not secrecy)
        self._gate = Gate(self.faults, self.counters, self._random)
        self.joins = self._rate(behaviour.max_joins_per_second)
        self._events = self._rate(behaviour.max_events_per_second)
        self._connections: set[Connection] = set()
        self._sessions: set[Session] = set()
        self._server: Server | None = None
        self._surroundings: Surroundings | None = None

    # ------------------------------------------------------------------ life

    async def start(self, host: str, port: int, feed: Feed) -> None:
        """Listen; raises OSError when the port is taken."""
        self._surroundings = Surroundings(
            feed, self._behaviour, self.faults, self.counters, self._secret, self._random
        )
        # The library reports every client that goes away during the handshake as an error: not ours to tell.
        quiet = logging.getLogger("standin.websockets")
        quiet.setLevel(logging.CRITICAL)
        self._server = await serve(
            self._serve_client,
            host,
            port,
            process_request=self._judge,
            process_response=_like_cowboy,
            create_connection=cast("type[ServerConnection]", self._make_connection),
            server_header=handshake.SERVER,
            compression=None,
            ping_interval=None,
            open_timeout=None,
            max_size=_MAX_MESSAGE_BYTES,
            logger=quiet,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        """Close every client with 1012, as the real server does when it is stopped, and stop listening."""
        if self._server is None:
            return
        self._gate.close()
        self._server.close(close_connections=False)
        await self.close_clients(RESTARTING)
        for connection in list(self._connections):
            connection.cut()
        await self._server.wait_closed()
        self._server = None

    async def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hand changes to their channels; pauses for a slow client once and shortly, never longer."""
        for number, delivery in enumerate(deliveries, 1):
            channel = cast("Channel", delivery.subscriber)
            self.counters.add("changes")
            if not channel.closed:
                await self._deliver_one(channel, delivery)
            if number % _BREATH == 0:
                await asyncio.sleep(0)

    async def resubscribed(self, subscriber: Hashable) -> None:
        """The feed made a subscription anew: the client is told, once for each binding."""
        channel = cast("Channel", subscriber)
        if not channel.closed:
            for _ in channel.request.sent:
                channel.send_system("ok", SUBSCRIBED)

    async def not_resubscribed(self, subscriber: Hashable, refusal: BadSubscription) -> None:
        """The feed could not make a subscription anew; the channel stays joined."""
        channel = cast("Channel", subscriber)
        if not channel.closed:
            channel.send_system("error", str(refusal))

    async def _deliver_one(self, channel: Channel, delivery: Delivery) -> None:
        if self._events.exceeded():
            self.counters.add("rate_limited")
            return
        self._events.add(len(delivery.ids))
        if channel.client.silenced:
            self.counters.add("dropped")
            return
        self._gate.passes(channel, delivery.data, delivery.ids)
        if channel.client.lagging:
            await channel.client.ease()

    # ---------------------------------------------------------------- clients

    def users(self) -> int:
        """Sockets with at least one channel."""
        return sum(1 for session in self._sessions if session.channels)

    async def close_clients(self, code: int) -> None:
        """Close every client with this code; 1006 means without a close frame."""
        async with asyncio.TaskGroup() as group:
            for session in list(self._sessions):
                group.create_task(session.close(code))

    def expire_tokens(self) -> None:
        """Every channel ends as if its token had expired just now."""
        for channel in self._channels():
            channel.end("Token has expired 0 seconds ago")

    def system_error(self, message: str) -> None:
        """Every subscription fails with this message; the channels stay joined."""
        for channel in self._channels():
            channel.lose_subscription(message)

    def repeat_subscribed(self) -> None:
        """Every channel is told once more that it is subscribed."""
        for channel in self._channels():
            if channel.request.sent:
                channel.send_system("ok", SUBSCRIBED)

    def late_close(self) -> None:
        """Every channel gets the phx_close of a join that is no longer its own."""
        for channel in self._channels():
            channel.send_close(_STALE_REF)

    async def act(self, actions: Mapping[str, Any]) -> None:
        """Do what the admin asks once."""
        if actions.get("resubscribed"):
            self.repeat_subscribed()
        if actions.get("late_close"):
            self.late_close()
        if "system_error" in actions:
            self.system_error(actions["system_error"])
        if actions.get("expire_tokens"):
            self.expire_tokens()
        if "close" in actions:
            await self.close_clients(actions["close"])

    def _channels(self) -> list[Channel]:
        return [channel for session in self._sessions for channel in session.channels.values()]

    async def _serve_client(self, socket: ServerConnection) -> None:
        assert self._surroundings is not None  # noqa: S101 (start sets it before listening)
        session = Session(self._surroundings, cast("Connection", socket), self)
        self._sessions.add(session)
        try:
            await session.run()
        except Exception:
            log.exception("a client's session broke; its connection is closed")
            raise
        finally:
            self._sessions.discard(session)

    async def _judge(self, socket: ServerConnection, request: Request) -> Response | None:
        connection = cast("Connection", socket)
        verdict = handshake.judge(request, self._secret, self._behaviour)
        if isinstance(verdict, handshake.Accepted):
            verdict = self._limited() or verdict
        if isinstance(verdict, handshake.Accepted):
            connection.version, connection.token = verdict.version, verdict.token
            connection.claims = verdict.claims
            return None
        self.counters.add("connections_refused")
        if verdict.late:
            await connection.pause(self._behaviour.handshake_refusal_delay)
        return verdict.response()

    def _limited(self) -> handshake.Refused | None:
        status = self.faults.refuse_connections
        if status is not False and status is not True:
            return handshake.fault_refusal(status)
        users = self._behaviour.max_users
        if users is not None and self.users() >= users:
            return handshake.refused(429, "Too many connected users")
        if self.joins.exceeded():
            return handshake.refused(429, "Too many joins per second")
        return None

    # ------------------------------------------------------------ connections

    def _make_connection(self, *arguments: Any, **options: Any) -> Connection:  # noqa: ANN401 (passed through)
        return Connection(*arguments, opened=self._opened, closed=self._closed, **options)

    def _opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        self.counters.add("connections")
        self.counters.add("connections_total")
        if self.faults.refuse_connections is True:
            self.counters.add("connections_refused")
            connection.cut()
        elif self.faults.half_open is True:
            connection.freeze()

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.counters.add("connections", -1)

    def _faults_changed(self, names: frozenset[str]) -> None:
        """Bring the connections in line with the switches that were set."""
        faults = self.faults
        for connection in list(self._connections):
            if "half_open" in names and faults.half_open:
                connection.freeze()
            elif "half_open" in names:
                connection.thaw()
            if "silent" in names:
                connection.silenced = faults.silent == CURRENT
        if "delay_ms" in names:
            self._gate.release()

    def _rate(self, limit: float | None) -> RateCounter:
        return RateCounter(limit, tick=self._behaviour.rate_tick, window=self._behaviour.rate_window)


def _like_cowboy(_socket: ServerConnection, _request: Request, response: Response) -> None:
    if response.status_code == 101:  # noqa: PLR2004 (an HTTP status)
        response.headers["cache-control"] = handshake.CACHE_CONTROL
