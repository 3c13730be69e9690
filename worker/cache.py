"""What handlers look up again and again, computed once for all workers and kept in Redis.

A value is kept together with a token of each row or table that it was computed from. When a change arrives,
the row's token is removed: what was computed under it counts for nothing from then on, whenever it is
written. So a value computed before a change and stored after it does no harm, nor does an emptied Redis.

Not a store: all of it may be gone at any time, and where Redis cannot be used values are simply computed.
"""

import asyncio
import contextlib
import datetime as dt
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from decimal import Decimal
from typing import Any, Final, TypeVar, cast, overload

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from worker.declarations import parse_table
from worker.errors import HandlerProblem, RetryLater
from worker.forgetting import Table

T = TypeVar("T")

Source = str | tuple[str, object]
"""What a value depends on: a table, or a row of it with the value of its primary key (a tuple of several)."""

MOST_BYTES: Final = 1024 * 1024
"""A larger value is given, but not kept: it would take room from the lanes."""
TOKEN_SECONDS: Final = 86_400
LOCK_SECONDS: Final = 30.0
"""After so long whoever computes a value is taken for dead."""
WAIT_SECONDS: Final = 5.0
"""So long others wait for it, and then compute for themselves: it may wait for a row they have locked."""
LOOK_SECONDS: Final = 0.02
_AWAY: Final = (RedisError, OSError)
_AT_ONCE: Final = 1_000
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_encode: Final = msgspec.msgpack.Encoder().encode
_kept: Final = msgspec.msgpack.Decoder(tuple[list[bytes], bytes]).decode


class Cache:
    """`context.cache`: values by name, shared by all workers.

    Args:
        redis: the worker's.
        prefix: of all its keys.
        tables: those that are followed, by `on.caches`.
    """

    def __init__(self, redis: Redis, prefix: str, tables: Collection[Table]) -> None:
        self._redis = redis
        self._prefix = f"{prefix}:cache"
        self.tables = tables

    @overload
    async def get(
        self,
        name: str,
        compute: Callable[[], Awaitable[T]],
        *,
        as_: type[T],
        ttl: float = ...,
        of: Source | list[Source] | None = ...,
    ) -> T: ...
    @overload
    async def get(
        self,
        name: str,
        compute: Callable[[], Awaitable[Any]],
        *,
        ttl: float = ...,
        of: Source | list[Source] | None = ...,
    ) -> Any: ...  # noqa: ANN401 - of whatever type it is
    async def get(
        self,
        name: str,
        compute: Callable[[], Awaitable[Any]],
        *,
        as_: Any = Any,
        ttl: float = 300.0,
        of: Source | list[Source] | None = None,
    ) -> Any:
        """Give the value of a name; compute it where there is none, once for all who ask at the same time.

        Compute it from what has been committed, and not from what the handler has just written: others are
        given the value, too.

        Args:
            name: of the value, with all that it depends on, as in "price of 7 in EUR".
            compute: computes it; the result is of types that msgspec knows, such as those of JSON, Decimal,
                datetime, UUID and dataclasses of them.
            as_: what to make of it again; without, what JSON would.
            ttl: seconds for which it holds at most; so long it may be wrong where no change is heard of.
            of: the table, or the row, whose changes end it before, or a list of such, as in
                `of=("public.customers", 7)`; each table must be followed, by `on.caches`.

        Raises:
            ValueError: a table is not followed, or the ttl is not above 0.
            TypeError: the result is of a type that cannot be kept.
            Exception: whatever `compute` raises; then nothing is kept.
        """
        if not ttl > 0:
            raise ValueError(f"ttl is a number of seconds above 0, not {ttl!r}")
        sources = self._sources(of)
        decode = msgspec.msgpack.Decoder(as_).decode
        lock, tokens = None, None
        with contextlib.suppress(*_AWAY):
            found, lock = await self._find_or_lock(name, sources, decode)
            if lock is None and found is not None:
                return found[0]
            # Before the computation: a change that comes in between removes them.
            tokens = await self._tokens(sources)
        try:
            value = _encode(await compute())
            if tokens is not None and len(value) <= MOST_BYTES:
                with contextlib.suppress(*_AWAY):
                    milliseconds = max(1, int(ttl * 1000))
                    await self._redis.set(self._key("value", name), _encode((tokens, value)), px=milliseconds)
        finally:
            if lock is not None:
                with contextlib.suppress(*_AWAY):
                    await self._release(name, lock)
        # As others are given it.
        return decode(value)

    async def forget(self, name: str) -> None:
        """Forget the value of a name."""
        with contextlib.suppress(*_AWAY):
            await self._redis.delete(self._key("value", name))

    async def rows_changed(self, table: Table, keys: Sequence[object]) -> None:
        """Forget what was computed from rows with these primary keys, and from their table.

        Raises:
            RetryLater: Redis cannot be used.
        """
        if not keys:
            return
        anything = self._key("table", _named(table))
        names = [self._row(table, key) for key in keys]
        try:
            for start in range(0, len(names), _AT_ONCE):
                await self._redis.delete(anything, *names[start : start + _AT_ONCE])
        except _AWAY as error:
            raise RetryLater(1) from error

    async def table_changed(self, table: Table) -> None:
        """Forget all that was computed from a table or its rows.

        Raises:
            RetryLater: Redis cannot be used.
        """
        try:
            await self._redis.delete(self._key("all", _named(table)))
        except _AWAY as error:
            raise RetryLater(1) from error

    async def _find_or_lock(
        self, name: str, sources: Sequence[str], decode: Callable[[bytes], Any]
    ) -> tuple[tuple[Any] | None, str | None]:
        """Find a value that holds, or take the lock to compute it under; neither after waiting in vain."""
        mine, key = secrets.token_hex(12), self._key("lock", name)
        until = time.monotonic() + WAIT_SECONDS
        while True:
            if (found := await self._find(name, sources, decode)) is not None:
                return found, None
            if await self._redis.set(key, mine, nx=True, px=int(LOCK_SECONDS * 1000)):
                # Who had it before us may have been done just then.
                found = await self._find(name, sources, decode)
                if found is None:
                    return None, mine
                await self._release(name, mine)
                return found, None
            if time.monotonic() > until:
                return None, None
            await asyncio.sleep(LOOK_SECONDS)

    async def _release(self, name: str, lock: str) -> None:
        await cast("Awaitable[Any]", self._redis.eval(_RELEASE, 1, self._key("lock", name), lock))

    async def _find(
        self, name: str, sources: Sequence[str], decode: Callable[[bytes], Any]
    ) -> tuple[Any] | None:
        blob, *tokens = await self._redis.mget(self._key("value", name), *sources)
        if blob is None or None in tokens:
            return None
        try:
            kept, value = _kept(blob)
            # Of another version, which had other types: as if it were not there.
            return (decode(value),) if kept == tokens else None
        except msgspec.MsgspecError:
            return None

    async def _tokens(self, sources: Sequence[str]) -> list[bytes]:
        """Give the tokens of what a value depends on, and make those that are not there."""
        tokens = await self._redis.mget(*sources) if sources else []
        if None in tokens:
            for source, token in zip(sources, tokens, strict=True):
                if token is None:
                    await self._redis.set(source, secrets.token_bytes(12), nx=True, ex=TOKEN_SECONDS)
            tokens = await self._redis.mget(*sources)
        return [token or b"" for token in tokens]

    def _sources(self, of: Source | list[Source] | None) -> list[str]:
        keys: dict[str, None] = {}
        for one in of if isinstance(of, list) else [] if of is None else [of]:
            text, *row = (one,) if isinstance(one, str) else one
            table = self._table(text)
            keys[self._key("all", _named(table))] = None
            keys[self._row(table, row[0]) if row else self._key("table", _named(table))] = None
        return list(keys)

    def _table(self, text: object) -> Table:
        try:
            table = parse_table(text)
        except HandlerProblem as problem:
            raise ValueError(str(problem)) from None
        if table not in self.tables:
            name = f"{table[0]}.{table[1]}"
            raise ValueError(f'{name} is not followed for the cache; declare it, as in on.caches("{name}")')
        return table

    def _row(self, table: Table, key: object) -> str:
        values = key if isinstance(key, tuple) else (key,)
        text = msgspec.json.encode([_text(value) for value in values]).decode()
        return self._key("row", f"{_named(table)}:{text}")

    def _key(self, kind: str, name: str) -> str:
        return f"{self._prefix}:{kind}:{name}"


def _named(table: Table) -> str:
    return f"{table[0]}.{table[1]}"


def _text(value: object) -> str:
    """Write a part of a primary key: equal ones alike."""
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(dt.UTC).isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return format(value.normalize(), "f")
    return value.hex() if isinstance(value, bytes) else str(value)
