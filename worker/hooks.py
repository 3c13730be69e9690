"""Supabase's database webhooks as a source: what a trigger posts waits in Redis until the listener takes it.

Whoever is asked over HTTP writes it down and answers; that may be a stand-by. The listener that has the lease
takes it from there, so one that restarts misses nothing that was answered with 200. What nobody was there to
answer is lost: who sends it, pg_net, does not try again. Not a source of truth: see docs/webhooks.md.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from worker.catalogue import Catalogue, Table
from worker.change import RawChange
from worker.errors import MalformedChange
from worker.source import Gap, SourceHealth

log = structlog.get_logger(__name__)

MOST_BYTES: Final = 8 * 1024 * 1024
"""Of one webhook: Postgres's rows may be larger, pg_net's requests better are not."""
_AT_ONCE: Final = 200
_BLOCK_MILLISECONDS: Final = 1_000
_AGAIN_SECONDS: Final = 0.5
_AWAY: Final = (RedisError, OSError)


class Hook(msgspec.Struct, frozen=True):
    """What Supabase posts."""

    type: Literal["INSERT", "UPDATE", "DELETE"]
    table: str
    schema: str
    record: dict[str, msgspec.Raw] | None = None
    old_record: dict[str, msgspec.Raw] | None = None


_hook: Final = msgspec.json.Decoder(Hook).decode


class InboxFullError(Exception):
    """More webhooks wait than may: the listener does not keep up, or there is none."""


def read_hook(body: bytes) -> Hook:
    """Read the body of a webhook.

    Raises:
        MalformedChange: it is none; the message names the part, never a value.
    """
    try:
        hook = _hook(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        # Of an unknown type msgspec quotes the value.
        told = str(error).split("'", 1)[0].strip()
        raise MalformedChange(f"this is no database webhook: {told}") from None
    if (hook.record is None) is (hook.type != "DELETE") or (hook.old_record is None) is (
        hook.type != "INSERT"
    ):
        raise MalformedChange(f"this is no database webhook: not the records of a {hook.type}")
    return hook


class Inbox:
    """Where webhooks wait: one stream in Redis, in the order in which they came.

    Args:
        redis: the listener's.
        queue: prefix of its key.
        most: webhooks that may wait.
    """

    def __init__(self, redis: Redis, queue: str, most: int) -> None:
        self._redis = redis
        self._name = f"{queue}:hooks"
        self._most = most

    async def put(self, body: bytes) -> None:
        """Write down a webhook.

        Raises:
            InboxFullError: too many wait.
            redis.exceptions.RedisError, OSError: Redis cannot be used.
        """
        if await self._redis.xlen(self._name) >= self._most:
            raise InboxFullError
        arrived = str(datetime.now(UTC).timestamp())
        await self._redis.xadd(self._name, {"body": body, "at": arrived})

    async def take(self) -> list[tuple[bytes, datetime, bytes]]:
        """Give the oldest that wait, (id, arrival, body) each; waits a second for one."""
        found: Any = await self._redis.xread({self._name: "0"}, count=_AT_ONCE, block=_BLOCK_MILLISECONDS)
        return [
            (id_, datetime.fromtimestamp(float(fields[b"at"]), UTC), fields[b"body"])
            for _, entries in found or ()
            for id_, fields in entries
        ]

    async def done(self, ids: Sequence[bytes]) -> None:
        """Forget those that are in their lanes."""
        if ids:
            await self._redis.xdel(self._name, *ids)


class HookSource:
    """Yields what has been posted; takes the place of Realtime in plain delivery."""

    def __init__(self, inbox: Inbox, catalogue: Catalogue) -> None:
        self._inbox = inbox
        self._catalogue = catalogue
        self._trouble: str | None = "webhooks are not being taken yet"
        self.subscribed_since: datetime | None = None
        """Since when webhooks are taken; None before the first look."""
        self.sure_until: datetime | None = None
        """The last look: what had been answered by then was taken."""
        self.waiting = 0
        """What was taken is handed over at once."""

    async def read(self) -> AsyncIterator[Sequence[RawChange | Gap]]:
        """Yield all that has arrived; what was yielded is forgotten when the next is asked for.

        A listener that is killed in between takes it again.
        """
        done: list[bytes] = []
        while True:
            looked = datetime.now(UTC)
            try:
                await self._inbox.done(done)
                done = []
                taken = await self._inbox.take()
            except _AWAY as error:
                self._trouble = f"Redis cannot be reached ({type(error).__name__}): check REDIS_URL"
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            self._trouble = None
            self.subscribed_since = self.subscribed_since or looked
            self.sure_until = looked
            done = [id_ for id_, _, _ in taken]
            changes: list[RawChange | Gap] = []
            for _, at, body in taken:
                changes += self._changes(body, at)
            if changes:
                yield changes

    def _changes(self, body: bytes, at: datetime) -> list[RawChange]:
        with contextlib.suppress(MalformedChange):  # it was read once before it was written down
            hook = read_hook(body)
            table = self._catalogue.tables.get((hook.schema, hook.table))
            # Of a table of no handler: nobody has to be told.
            return [raw_change(hook, table, at)] if table is not None else []
        log.error("webhook left out", reason="it cannot be read")
        return []

    def doubt(self, reason: str) -> None:
        """Nothing follows: a webhook that is lost leaves no trace."""

    def health(self) -> SourceHealth:
        """Tell the state of this moment."""
        reasons = (self._trouble,) if self._trouble else ()
        return SourceHealth(
            ready=not reasons,
            reasons=reasons,
            connected=not reasons,
            subscribed=self.subscribed_since is not None,
            canary_seconds=None,
            lag_seconds=None,
        )


def raw_change(hook: Hook, table: Table, at: datetime) -> RawChange:
    """Write a webhook as Realtime would have: with the columns' types, which it does not tell.

    Args:
        hook: the webhook.
        table: as the catalogue has it; columns that it does not have yet, or no more, are left out.
        at: of its arrival: when it was committed, nobody says.
    """
    there = hook.record or hook.old_record or {}
    columns = [{"name": one.name, "type": one.type} for one in table.columns.values() if one.name in there]
    names = {one["name"] for one in columns}
    payload = {
        "schema": hook.schema,
        "table": hook.table,
        "type": hook.type,
        "columns": columns,
        "record": _known(hook.record, names),
        "old_record": _known(hook.old_record, names),
        "commit_timestamp": at.isoformat(timespec="milliseconds"),
        "errors": None,
    }
    return RawChange.decode("realtime", msgspec.json.encode(payload))


def _known(row: Mapping[str, msgspec.Raw] | None, names: set[str]) -> dict[str, msgspec.Raw] | None:
    return None if row is None else {name: value for name, value in row.items() if name in names}
