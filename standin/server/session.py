"""One client's session: its messages, its channels, and the time it may stay silent.

It decides which message reaches which channel. The frames' text is made in `frames`, the subscriptions in
`channel`.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Protocol

from websockets.exceptions import ConnectionClosed

from standin.server import frames, tokens
from standin.server.bindings import TOPIC_PREFIX
from standin.server.channel import Channel, Surroundings
from standin.server.connection import Connection, Outbox
from standin.server.rates import RateCounter

_CLOSE_SECONDS = 2.0


class Limits(Protocol):
    """The limits that span all clients."""

    joins: RateCounter

    def users(self) -> int:
        """Sockets with at least one channel."""


class Session:
    """A connected client, from the handshake to the end of its connection."""

    def __init__(self, surroundings: Surroundings, connection: Connection, limits: Limits) -> None:
        self._surroundings = surroundings
        self._limits = limits
        self.connection = connection
        self.channels: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        counters = surroundings.counters
        self._outbox = Outbox(
            connection,
            limit=surroundings.behaviour.send_buffer_bytes,
            sent=lambda: counters.add("frames_sent"),
            cut=self._cut,
        )

    async def run(self) -> None:
        """Serve the client until its connection ends."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self.spawn(self._outbox.run(), "send")
                self.spawn(self._watch(), "watch")
                with contextlib.suppress(ConnectionClosed):
                    await self._read()
                for task in list(self._tasks):
                    task.cancel()
        finally:
            self._group = None
            await self._forget_channels()

    # ------------------------------------------------- what its channels need

    @property
    def silenced(self) -> bool:
        """Whether changes are withheld from this client for its life."""
        return self.connection.silenced

    @property
    def lagging(self) -> bool:
        """Whether the feed should pause for this client, by awaiting `ease`."""
        return self._outbox.lagging

    async def ease(self) -> None:
        """Let the client catch up, within bounds."""
        await self._outbox.ease()

    def send(self, frame: bytes) -> None:
        """Queue a frame."""
        self._outbox.put(frame)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something for as long as the client is connected."""
        if self._group is None:
            work.close()
            raise RuntimeError("the session has ended")
        task = self._group.create_task(work, name=f"standin session: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def channel_ended(self, channel: Channel) -> None:
        """The channel is over from the server's side."""
        if self._group is not None:
            self.spawn(self._drop(channel), f"drop {channel.topic}")

    # -------------------------------------------------------------- messages

    async def _read(self) -> None:
        while True:
            text = await self.connection.recv(decode=False)
            self._surroundings.counters.add("messages_received")
            message = frames.decode(text, self.connection.version)
            if message is not None:
                await self._dispatch(message)

    async def _dispatch(self, message: frames.Message) -> None:
        if message.topic == "phoenix":
            if message.event == "heartbeat":
                self._surroundings.counters.add("heartbeats")
                self._reply(message, "ok", {})
            return
        channel = self.channels.get(message.topic)
        if message.event == "phx_join":
            await self._join(message, channel)
        elif channel is None:
            # Leaving what was never joined is answered as done; anything else has no receiver.
            if message.event == "phx_leave":
                self._reply(message, "ok", {}, join_ref=message.join_ref)
            else:
                self._reply(message, "error", {"reason": "unmatched topic"})
        elif message.event == "phx_leave":
            await self._leave(message, channel)
        elif channel.join_ref is None or message.join_ref in (None, channel.join_ref):
            self._to_channel(message, channel)

    def _to_channel(self, message: frames.Message, channel: Channel) -> None:
        if message.event == "access_token" and isinstance(message.payload, dict):
            channel.renew(message.payload.get("access_token"))

    async def _leave(self, message: frames.Message, channel: Channel) -> None:
        # Trap for clients: one that names its join in phx_join must name it here too, or nothing happens.
        if channel.join_ref is not None and message.join_ref != channel.join_ref:
            return
        self._surroundings.counters.add("leaves")
        await self._drop(channel)
        self._reply(message, "ok", {}, join_ref=channel.join_ref)
        channel.send_close(channel.join_ref)

    # ------------------------------------------------------------------ join

    async def _join(self, message: frames.Message, before: Channel | None) -> None:
        if not message.topic.startswith(TOPIC_PREFIX):
            self._reply(message, "error", {"reason": "unmatched topic"})
            return
        token, claims = "", dict[str, Any]()
        try:
            token, claims = self._token_of(message)
            refusal = self._refusal(message, claims, before)
        except tokens.TokenError as error:
            refusal = f"{error.code}: {error.join_text}"
        self._limits.joins.add()
        if refusal is not None:
            # The real server sleeps in the socket's own process: it reads nothing else of this client.
            if before is not None:
                await self._drop(before)
            await self.connection.pause(self._surroundings.behaviour.join_error_delay)
            self._surroundings.counters.add("joins_refused")
            self._reply(message, "error", {"reason": refusal}, join_ref=message.join_ref)
            if before is not None:
                before.send_close(before.join_ref)
            return
        await self._enter(message, before, token, claims)

    async def _enter(
        self, message: frames.Message, before: Channel | None, token: str, claims: dict[str, Any]
    ) -> None:
        if before is not None:
            await self._drop(before)
        channel = Channel(
            self._surroundings,
            self.connection.version,
            message,
            token=token,
            claims=claims,
            client=self,
        )
        self.channels[message.topic] = channel
        self._surroundings.counters.add("channels")
        self._surroundings.counters.add("joins")
        self._reply(message, "ok", {"postgres_changes": channel.request.echo()}, join_ref=message.join_ref)
        if before is not None:
            before.send_close(before.join_ref)
        channel.start()

    def _token_of(self, message: frames.Message) -> tuple[str, dict[str, Any]]:
        payload = message.payload if isinstance(message.payload, dict) else {}
        token = payload.get("access_token") or payload.get("user_token")
        if not isinstance(token, str) or token.startswith("sb_") or token == self.connection.token:
            # The channel then lives by the token of the connection, which may have expired since.
            token, claims = self.connection.token, self.connection.claims
            tokens.check_expiry(claims)
            return token, claims
        return token, tokens.verify(token, self._surroundings.secret)

    def _refusal(self, message: frames.Message, claims: dict[str, Any], before: Channel | None) -> str | None:
        around = self._surroundings
        refused = around.faults.refuse_joins
        if refused:
            unable = "UnableToConnectToProject: Realtime was unable to connect to the project database"
            return refused if isinstance(refused, str) else unable
        if message.topic == TOPIC_PREFIX:
            return "TopicNameRequired: You must provide a topic name"
        if _is_private(message.payload) and claims["role"] != "service_role":
            name = message.topic.removeprefix(TOPIC_PREFIX)
            return f"Unauthorized: You do not have permissions to read from this Channel topic: {name}"
        return self._over_limit(again=before is not None)

    def _over_limit(self, *, again: bool) -> str | None:
        behaviour = self._surroundings.behaviour
        if self._limits.joins.exceeded():
            return "ClientJoinRateLimitReached: Too many joins per second"
        most = behaviour.max_channels_per_client
        if most is not None and not again and len(self.channels) >= most:
            return "ChannelRateLimitReached: Too many channels"
        users = behaviour.max_users
        if users is not None and not self.channels and self._limits.users() >= users:
            return "ConnectionRateLimitReached: Too many connected users"
        return None

    # --------------------------------------------------------------- the end

    async def _drop(self, channel: Channel) -> None:
        if channel.closed:
            return
        channel.close()
        if self.channels.get(channel.topic) is channel:
            del self.channels[channel.topic]
        self._surroundings.counters.add("channels", -1)
        await self._surroundings.feed.unsubscribe(channel)

    async def _forget_channels(self) -> None:
        for channel in list(self.channels.values()):
            await self._drop(channel)

    def _cut(self) -> None:
        self._surroundings.counters.add("clients_cut")
        self.connection.cut()

    async def _watch(self) -> None:
        """Close a client that sends nothing, cut one that takes nothing."""
        behaviour = self._surroundings.behaviour
        loop = asyncio.get_running_loop()
        pause = min(behaviour.idle_timeout, behaviour.send_timeout) / 10
        while True:
            await asyncio.sleep(pause)
            if not self.connection.flowing.is_set():
                continue
            now = loop.time()
            since = self._outbox.sending_since
            if since is not None and now - since > behaviour.send_timeout:
                self._cut()
                return
            if now - self.connection.last_received > behaviour.idle_timeout:
                await self.close(1000)
                return

    async def close(self, code: int) -> None:
        """Close the websocket; 1006 and a client that does not take part mean a cut."""
        if code == 1006 or not self.connection.flowing.is_set():  # noqa: PLR2004 (close codes are numbers)
            self.connection.cut()
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.connection.close(code)
        except TimeoutError:
            self.connection.cut()

    # ----------------------------------------------------------------- parts

    def _reply(
        self, message: frames.Message, status: str, response: object, *, join_ref: object = None
    ) -> None:
        version = self.connection.version
        self._outbox.put(frames.encode_reply(version, message, status, response, join_ref=join_ref))


def _is_private(payload: object) -> bool:
    config = payload.get("config") if isinstance(payload, dict) else None
    return isinstance(config, dict) and config.get("private") is True
