"""One joined channel: its subscription, its token, and the frames it sends.

It speaks to the change feed and to the client's outbox. Which messages reach it is the session's business.
"""

import asyncio
import random
import time
from collections.abc import Coroutine, Hashable, Mapping, Sequence
from typing import Any, Protocol

import orjson

from standin.changes import BadSubscription, Binding
from standin.server import bindings as bindings_module
from standin.server import frames, tampering, tokens
from standin.server.behaviour import Behaviour
from standin.server.counters import Counters
from standin.server.faults import Faults

SUBSCRIBED = "Subscribed to PostgreSQL"


class Feed(Protocol):
    """What channels need of the source of changes."""

    async def subscribe(
        self, subscriber: Hashable, bindings: Sequence[Binding], claims: Mapping[str, Any]
    ) -> None:
        """Return when the subscription is live, however long that takes; raises BadSubscription."""

    async def unsubscribe(self, subscriber: Hashable) -> None:
        """Forget a subscriber, known or not."""


class Client(Protocol):
    """What channels need of the client that joined them."""

    @property
    def silenced(self) -> bool:
        """Whether changes are withheld from this client for its life."""

    @property
    def lagging(self) -> bool:
        """Whether the feed should pause for this client, by awaiting `ease`."""

    async def ease(self) -> None:
        """Let the client catch up, within bounds."""

    def send(self, frame: bytes) -> None:
        """Queue a frame."""

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something for as long as the client is connected."""

    def channel_ended(self, channel: "Channel") -> None:
        """The channel is over from the server's side."""


class Surroundings:
    """What all channels share."""

    def __init__(
        self,
        feed: Feed,
        behaviour: Behaviour,
        faults: Faults,
        counters: Counters,
        secret: str,
        random_source: random.Random,
    ) -> None:
        self.feed = feed
        self.behaviour = behaviour
        self.faults = faults
        self.counters = counters
        self.secret = secret
        self.random = random_source


class Channel:
    """A topic that a client has joined; hashable by identity, which makes it the feed's subscriber."""

    def __init__(
        self,
        surroundings: Surroundings,
        version: frames.Version,
        join: frames.Message,
        *,
        token: str,
        claims: dict[str, Any],
        client: Client,
    ) -> None:
        self._surroundings = surroundings
        self._version = version
        self.topic = join.topic
        self.join_ref = join.join_ref
        self.request = bindings_module.read_request(join.topic, join.payload)
        self._token = token
        self._claims = claims
        self.client = client
        self._presence = _wants_presence(join.payload)
        self._head, self._foot = b"", b""
        self._wire_ids: dict[int, list[int]] = {}
        self._tails: dict[tuple[int, ...], bytes] = {}
        self._subscribing: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self.closed = False

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin what follows the join's reply: the subscription, and the watch over the token's end."""
        self._watch_expiry()
        self._subscribing = self.client.spawn(self._subscribe_first(), f"subscribe {self.topic}")

    def renew(self, token: object) -> None:
        """An access_token message: a changed token is checked and subscribed with, anything else ignored."""
        if not isinstance(token, str) or token == self._token or token.startswith("sb_"):
            return
        try:
            claims = tokens.verify(token, self._surroundings.secret)
        except tokens.TokenError as error:
            self.end(error.join_text)
            return
        self._token, self._claims = token, claims
        self._watch_expiry()
        if self.request.sent:
            self._cancel_subscribing()
            delay = self._surroundings.random.uniform(*self._surroundings.behaviour.resubscribe_delay)
            self._subscribing = self.client.spawn(
                self._subscribe_again(delay), f"subscribe again {self.topic}"
            )

    def end(self, reason: str) -> None:
        """The server's end of the channel: a system error, then phx_close."""
        self.send_system("error", reason, extension="system")
        self.send_close(self.join_ref)
        self.client.channel_ended(self)

    def close(self) -> None:
        """Stop everything of the channel, without a frame."""
        self.closed = True
        self._cancel_subscribing()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def lose_subscription(self, message: str) -> None:
        """The subscription fails: the channel stays joined, and nothing comes any more."""
        self._cancel_subscribing()
        self.client.spawn(self._surroundings.feed.unsubscribe(self), f"unsubscribe {self.topic}")
        self.send_system("error", message)

    # ---------------------------------------------------------------- frames

    def change_frame(self, data: bytes, ids: tuple[int, ...]) -> bytes:
        """The frame of one change; `data` is the text of payload.data, `ids` are the feed's."""
        if self.request.first_api:
            head, tail = frames.change_envelope(self._version, self.topic, tampering.change_type(data))
            return head + data + tail
        tail = self._tails.get(ids) or self._make_tail(ids)
        return self._head + data + tail

    def send_system(self, status: str, message: str, *, extension: str = "postgres_changes") -> None:
        """Send a system frame."""
        name = self.topic.removeprefix(bindings_module.TOPIC_PREFIX)
        payload = {"message": message, "status": status, "extension": extension, "channel": name}
        self.client.send(frames.encode(self._version, self.topic, "system", payload, join_ref=self.join_ref))

    def send_close(self, join_ref: object) -> None:
        """Send a phx_close, which names the join that it ends."""
        self.client.send(
            frames.encode(self._version, self.topic, "phx_close", {}, ref=join_ref, join_ref=join_ref)
        )

    def _make_tail(self, ids: tuple[int, ...]) -> bytes:
        remaining = {feed_id: list(wire) for feed_id, wire in self._wire_ids.items()}
        shown = [remaining[feed_id].pop(0) if remaining.get(feed_id) else feed_id for feed_id in ids]
        tail = b',"ids":' + orjson.dumps(shown) + b"}" + self._foot
        self._tails[ids] = tail
        return tail

    # ---------------------------------------------------------- subscription

    async def _subscribe_first(self) -> None:
        if self.request.sent:
            await self._subscribe()
        if self._presence:
            frame = frames.encode(self._version, self.topic, "presence_state", {}, join_ref=self.join_ref)
            self.client.send(frame)

    async def _subscribe_again(self, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._subscribe()

    async def _subscribe(self) -> None:
        around = self._surroundings
        if around.faults.withhold_subscribed:
            return
        try:
            wanted = [bindings_module.parse(sent) for sent in self.request.sent]
            self._prepare_frames(wanted)
            await around.feed.subscribe(self, wanted, self._claims)
        except BadSubscription as refusal:
            self.send_system("error", str(refusal))
            return
        around.counters.add("subscriptions")
        self.send_system("ok", SUBSCRIBED)

    def _prepare_frames(self, wanted: Sequence[Binding]) -> None:
        head, self._foot = frames.change_envelope(self._version, self.topic, "postgres_changes")
        self._head = head + b'{"data":'
        ids = [bindings_module.wire_id(sent) for sent in self.request.sent]
        self._wire_ids = bindings_module.wire_ids(zip(wanted, ids, strict=True))
        self._tails.clear()

    def _cancel_subscribing(self) -> None:
        if self._subscribing is not None:
            self._subscribing.cancel()
            self._subscribing = None

    # ----------------------------------------------------------------- token

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        # Whole seconds of the clock, as the real server counts: the end comes up to a second late.
        seconds = max(0, int(self._claims["exp"]) - int(time.time()))
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        ago = int(time.time()) - int(self._claims["exp"])
        if ago < 0:
            # A timer may fire a moment early by the clock on the wall.
            self._watch_expiry()
            return
        self.end(tokens.expired_text(ago))


def _wants_presence(payload: object) -> bool:
    config = payload.get("config") if isinstance(payload, dict) else None
    presence = config.get("presence") if isinstance(config, dict) else None
    return isinstance(presence, dict) and presence.get("enabled") is True
