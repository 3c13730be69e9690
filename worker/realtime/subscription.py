"""The channels of one socket: what to join when, and what the frames about them mean. Pure: no I/O, no clock.

One channel for each table, because one bad binding disables all bindings of its channel, in silence but for
one frame. Above `MOST_CHANNELS` tables several share a channel, and a bad one among them is given its own.

Joined is not subscribed: changes flow only after Realtime's "Subscribed", and whatever is committed before
is lost.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from worker.realtime.frames import TOPIC_PREFIX, ChannelEnded, Frame, Reply, SystemNotice
from worker.realtime.timing import Timing, backoff

TableName = tuple[str, str]
"""(schema, table)"""

MOST_CHANNELS = 90
"""Channels that share out the tables. Realtime allows 100 on a connection: the canary has its own, the rest
is room for tables that have to be isolated."""
CHANNEL_LIMIT = 99

_EXPIRED = ("Token has expired", "InvalidJWTToken: Token has expired")
_LIMITED = (
    "ChannelRateLimitReached",
    "ConnectionRateLimitReached",
    "ClientJoinRateLimitReached",
    "DatabaseConnectionRateLimitReached",
    "Too many",
)
_REFUSED = (
    "InvalidJWTToken",
    "MalformedJWT",
    "JwtSign",
    "Unauthorized",
    "PrivateOnly",
    "TopicNameRequired",
    "TenantNotFound",
    "RealtimeDisabledForTenant",
)
_RETRIED_BY_SERVER = "Too many database timeouts"


class Stage(Enum):
    """How far a channel is."""

    WAITING = auto()
    JOINING = auto()
    JOINED = auto()
    SUBSCRIBED = auto()


@dataclass
class Channel:
    """One Phoenix topic and the tables bound in it."""

    topic: str
    tables: tuple[TableName, ...]
    stage: Stage = Stage.WAITING
    due: float = 0.0
    """When the present stage has lasted too long (WAITING: when to join); never for SUBSCRIBED."""
    join_ref: str | None = None
    failures: int = 0
    trouble: str = ""
    """Realtime's words about the last failure; empty after a success."""
    names: frozenset[TableName] = field(init=False)

    def __post_init__(self) -> None:
        self.bind(self.tables)

    def bind(self, tables: tuple[TableName, ...]) -> None:
        """Change the tables; takes effect with the next join."""
        self.tables = tables
        self.names = frozenset(tables)


class Join(NamedTuple):
    """A join to be sent."""

    topic: str
    ref: str
    tables: tuple[TableName, ...]


class Subscribed(NamedTuple):
    """Realtime says that these tables are subscribed."""

    tables: tuple[TableName, ...]
    again: bool
    """They were already: it has made the subscription anew, and what was committed meanwhile may be lost."""


class Lost(NamedTuple):
    """These tables were subscribed and are no more."""

    tables: tuple[TableName, ...]
    cause: str


class Replace(NamedTuple):
    """Only another socket helps."""

    cause: str


Outcome = Subscribed | Lost | Replace


def cut(tables: Iterable[TableName], most: int = MOST_CHANNELS) -> list[tuple[TableName, ...]]:
    """Share tables out among at most so many channels: one each while that is enough."""
    distinct = list(dict.fromkeys(tables))
    return [tuple(distinct[start::most]) for start in range(min(most, len(distinct)))]


class Subscriptions:
    """All channels of the source. Lives longer than a socket: it remembers what had to be isolated.

    Args:
        tables: what to subscribe to.
        canary: the canary's table; it has its own channel.
        timing: the waits.
    """

    def __init__(self, tables: Sequence[TableName], canary: TableName, timing: Timing) -> None:
        self._timing = timing
        self._refs = itertools.count(1)
        self._names = itertools.count(1)
        self.canary = Channel(f"{TOPIC_PREFIX}tailrace-canary", (canary,))
        self._channels = {self.canary.topic: self.canary}
        for group in cut(table for table in tables if table != canary):
            self._add(group)

    @property
    def channels(self) -> list[Channel]:
        """The channels of the tables, without the canary's."""
        return [channel for channel in self._channels.values() if channel is not self.canary]

    @property
    def complete(self) -> bool:
        """True while every table is subscribed, the canary aside."""
        return all(channel.stage is Stage.SUBSCRIBED for channel in self.channels)

    def concerns(self, topic: str, table: TableName) -> bool:
        """Tell whether a change that came on a topic is one we asked for there.

        Realtime matches names as LIKE patterns: `user_events` also brings the changes of `userXevents`.
        """
        channel = self._channels.get(topic)
        return channel is not None and table in channel.names

    def tables_of(self, topic: str | None) -> tuple[TableName, ...]:
        """Return the tables that a frame on this topic may have been about; all when nobody knows."""
        channel = self._channels.get(topic or "")
        if channel is not None:
            return () if channel is self.canary else channel.tables
        return tuple(table for each in self.channels for table in each.tables)

    def begin(self, now: float) -> None:
        """Start anew on a new socket."""
        for place, channel in enumerate(self._channels.values()):
            channel.stage = Stage.WAITING
            channel.join_ref = None
            channel.due = now + place * self._timing.join_spacing

    def end(self) -> None:
        """The socket is gone: nothing is joined any more."""
        for channel in self._channels.values():
            channel.stage = Stage.WAITING
            channel.join_ref = None
            channel.due = math.inf

    def next_due(self) -> float:
        """Return the moment of the next `tick` that will do something."""
        return min(channel.due for channel in self._channels.values())

    def tick(self, now: float) -> tuple[list[Join], list[Outcome]]:
        """Let time pass: return joins to send, and what the missed deadlines mean."""
        joins: list[Join] = []
        outcomes: list[Outcome] = []
        for channel in list(self._channels.values()):
            if channel.due > now:
                continue
            if channel.stage is Stage.WAITING:
                channel.stage = Stage.JOINING
                channel.join_ref = str(next(self._refs))
                channel.due = now + self._timing.join
                joins.append(Join(channel.topic, channel.join_ref, channel.tables))
            elif channel.stage is Stage.JOINING:
                outcomes += self._failed(channel, "Realtime does not answer the join", now)
            elif channel.stage is Stage.JOINED:
                outcomes += self._failed(
                    channel, "joined, but Realtime never said that it is subscribed", now
                )
        return joins, outcomes

    def frame(self, frame: Frame, now: float) -> list[Outcome]:
        """Take in what Realtime says about a channel."""
        channel = self._channels.get(frame.topic)
        if channel is None:
            return []
        if isinstance(frame, Reply):
            return self._reply(channel, frame, now)
        if isinstance(frame, SystemNotice):
            return self._notice(channel, frame, now)
        if isinstance(frame, ChannelEnded):
            # The close of an older join of the same topic comes after the new join's reply: not ours.
            late = frame.ref is not None and frame.ref != channel.join_ref
            if late or channel.stage is Stage.WAITING:
                return []
            return self._failed(
                channel, f"Realtime {'crashed' if frame.crashed else 'closed'} the channel", now
            )
        return []

    def _reply(self, channel: Channel, frame: Reply, now: float) -> list[Outcome]:
        if channel.stage is not Stage.JOINING or frame.ref != channel.join_ref:
            return []
        if frame.ok:
            channel.stage = Stage.JOINED
            channel.due = now + self._timing.acknowledge
            return []
        if frame.reason.startswith(_EXPIRED):
            # A join on the same socket would use the same token.
            return [Replace(frame.reason)]
        return self._failed(channel, frame.reason, now)

    def _notice(self, channel: Channel, notice: SystemNotice, now: float) -> list[Outcome]:
        if channel.stage in {Stage.WAITING, Stage.JOINING}:
            return []  # said of an older join
        if notice.message.startswith((*_EXPIRED, "Server requested disconnect")):
            return [Replace(notice.message)]
        if notice.extension == "postgres_changes" and notice.ok:
            again = channel.stage is Stage.SUBSCRIBED
            channel.stage = Stage.SUBSCRIBED
            channel.due = math.inf
            channel.failures, channel.trouble = 0, ""
            return [Subscribed(channel.tables, again)]
        if notice.ok:
            return []
        if _RETRIED_BY_SERVER in notice.message and channel is not self.canary:
            was_subscribed = channel.stage is Stage.SUBSCRIBED
            channel.stage, channel.due = Stage.JOINED, now + self._timing.acknowledge
            channel.trouble = notice.message
            return [Lost(channel.tables, notice.message)] if was_subscribed else []
        tables = channel.tables  # as they were subscribed: isolation may take some away
        binding = notice.extension == "postgres_changes"
        lost = self._failed(channel, notice.message, now)
        if binding and len(tables) > 1:
            self._isolate(channel, notice.message, now)
        return lost

    def _failed(self, channel: Channel, cause: str, now: float) -> list[Outcome]:
        was_subscribed = channel.stage is Stage.SUBSCRIBED
        channel.stage = Stage.WAITING
        channel.failures += 1
        channel.trouble = cause
        timing = self._timing
        if cause.startswith(_LIMITED):
            channel.due = now + backoff(timing.rejoin_limited * 2, timing.rejoin_limited * 2, 1)
        elif cause.startswith(_REFUSED):
            channel.due = now + timing.rejoin_refused
        else:
            channel.due = now + backoff(timing.rejoin, timing.rejoin_max, channel.failures)
        if not was_subscribed:
            return []
        if channel is self.canary:
            # The next join may start Realtime's poller anew, which forgets every other subscription in
            # silence while the canary is well. All must join again.
            return [Replace(f"the canary's channel was lost: {cause}")]
        return [Lost(channel.tables, cause)]

    def _isolate(self, channel: Channel, message: str, now: float) -> None:
        """Give the table that fails its channel one of its own; halve the channel when it is not named."""
        if len(self._channels) >= CHANNEL_LIMIT:
            return
        guilty = tuple(t for t in channel.tables if f"schema: {t[0]}, table: {t[1]}, " in message)
        apart = (
            guilty if 0 < len(guilty) < len(channel.tables) else channel.tables[len(channel.tables) // 2 :]
        )
        rest = tuple(table for table in channel.tables if table not in apart)
        added = self._add(apart)
        added.failures, added.trouble, added.due = channel.failures, message, channel.due
        channel.bind(rest)
        channel.failures, channel.trouble, channel.due = 0, "", now

    def _add(self, tables: tuple[TableName, ...]) -> Channel:
        channel = Channel(f"{TOPIC_PREFIX}tailrace-{next(self._names)}", tables)
        self._channels[channel.topic] = channel
        return channel
