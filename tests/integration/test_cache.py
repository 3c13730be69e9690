"""`context.cache`: computed once for all, and never older than the changes that a handler is called with."""

import asyncio
import dataclasses
import datetime as dt
import secrets
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import bench, item
from tests.stack import Servers
from worker import Change, Context, Handlers
from worker.cache import Cache
from worker.errors import RetryLater
from worker.forgetting import cached_tables
from worker.queue import connection_pool

ITEMS = ("public", "items")


@pytest.fixture
async def redis(shared: Servers) -> AsyncIterator[Redis]:
    async with Redis(connection_pool=connection_pool(shared.redis.url)) as redis:
        yield redis
        await redis.aclose(close_connection_pool=True)


@pytest.fixture
def cache(redis: Redis, request: pytest.FixtureRequest) -> Cache:
    return Cache(redis, request.node.name, {ITEMS, ("public", "pairs")})


class Computing:
    """Computes, counting how often; waits for `go` if told to."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)
        self.times = 0
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()

    async def __call__(self) -> Any:
        value = self.values[min(self.times, len(self.values) - 1)]
        self.times += 1
        self.begun.set()
        await self.go.wait()
        if isinstance(value, Exception):
            raise value
        return value


async def test_a_value_is_computed_once_for_all_who_ask(cache: Cache, redis: Redis) -> None:
    computing = Computing("a")
    computing.go.clear()
    # As another worker has it.
    other = Cache(redis, cache._prefix.removesuffix(":cache"), cache.tables)
    asking = [asyncio.create_task(one.get("n", computing)) for one in (cache, other) * 5]
    await computing.begun.wait()
    computing.go.set()
    assert await asyncio.gather(*asking) == ["a"] * 10
    assert computing.times == 1


@dataclasses.dataclass
class Price:
    amount: Decimal
    since: dt.datetime
    of: UUID | None = None


async def test_values_come_back_as_what_they_are(cache: Cache) -> None:
    price = Price(Decimal("1.10"), dt.datetime(2026, 1, 2, tzinfo=dt.UTC), UUID(int=3))
    for _ in range(2):
        assert await cache.get("price", Computing(price), as_=Price) == price
        assert await cache.get("none", Computing(None)) is None
        assert await cache.get("list", Computing((1, "x"))) == [1, "x"]
    # Asked for as something else, as a newer version may: computed anew, and not an error.
    assert await cache.get("list", Computing(5), as_=int) == 5


@pytest.mark.parametrize(
    ("of", "table", "keys"),
    [
        (("public.items", 7), ITEMS, [3, 7]),
        (("items", 7), ITEMS, ["7"]),
        ("items", ITEMS, [1]),
        (["items", ("pairs", (1, UUID(int=2)))], ("public", "pairs"), [(1, UUID(int=2))]),
    ],
)
async def test_a_change_of_what_it_depends_on_ends_it(
    cache: Cache, of: Any, table: tuple[str, str], keys: list[Any]
) -> None:
    computing = Computing("old", "new")
    assert await cache.get("n", computing, of=of) == "old"
    await cache.rows_changed(table, [100_000])
    if not (isinstance(of, str)):
        assert await cache.get("n", computing, of=of) == "old"
    await cache.rows_changed(table, keys)
    assert await cache.get("n", computing, of=of) == "new"
    assert await cache.get("n", computing, of=of) == "new"
    await cache.table_changed(table)
    assert computing.times == 2
    await cache.get("n", computing, of=of)
    assert computing.times == 3


async def test_what_was_computed_before_a_change_is_not_kept_after_it(cache: Cache) -> None:
    computing = Computing("old", "new")
    computing.go.clear()
    asking = asyncio.create_task(cache.get("n", computing, of=("items", 7)))
    await computing.begun.wait()
    await cache.rows_changed(ITEMS, [7])
    computing.go.set()
    assert await asking == "old"
    assert await cache.get("n", computing, of=("items", 7)) == "new"


async def test_who_fails_to_compute_leaves_it_to_the_next(cache: Cache) -> None:
    computing = Computing(ValueError("no"), "yes")
    with pytest.raises(ValueError, match="no"):
        await cache.get("n", computing)
    assert await cache.get("n", computing) == "yes"
    with pytest.raises(TypeError):
        await cache.get("o", Computing(object()))
    assert await cache.get("o", Computing(1)) == 1


async def test_values_end_with_their_time_or_when_told(cache: Cache, redis: Redis) -> None:
    await cache.get("n", Computing(1), ttl=20)
    (key,) = [one async for one in redis.scan_iter(match=f"{cache._prefix}:value:*")]
    assert 19_000 < await redis.pttl(key) <= 20_000
    await cache.forget("n")
    assert await cache.get("n", Computing(2)) == 2
    with pytest.raises(ValueError, match="ttl is a number of seconds above 0, not 0"):
        await cache.get("n", Computing(1), ttl=0)


async def test_only_tables_that_are_followed_can_end_it(cache: Cache) -> None:
    with pytest.raises(ValueError, match=r'declare it, as in on.caches\("public.orders"\)'):
        await cache.get("n", Computing(1), of=("orders", 1))


async def test_without_redis_values_are_computed_and_changes_come_later() -> None:
    away = Redis(host="127.0.0.1", port=9)
    cache = Cache(away, "t", {ITEMS})
    computing = Computing(1, 2)
    assert [await cache.get("n", computing, of="items") for _ in range(2)] == [1, 2]
    with pytest.raises(RetryLater):
        await cache.rows_changed(ITEMS, [1])
    await away.aclose()


async def test_handlers_are_never_given_what_is_older_than_their_changes(shared: Servers) -> None:
    """Through lanes and drains: the handler that follows the table lags, and the others see the new row."""
    on, seen = Handlers(), list[Any]()
    on.caches("public.items")

    async def note(session: AsyncSession, context: Context, id_: int) -> str:
        async def compute() -> str:
            return str(await session.scalar(text("select note from items where id = :id"), {"id": id_}))

        return await context.cache.get(f"note of {id_}", compute, as_=str, of=("public.items", id_))

    @on.change("public.items", name="rows")
    async def rows(change: Change, session: AsyncSession, context: Context) -> None:
        seen.append(("rows", await note(session, context, change.key[0])))

    @on.derive("public.items", by="grp", name="groups")
    async def groups(keys: list[int], session: AsyncSession, context: Context) -> None:
        seen.append(("groups", await note(session, context, 1)))

    @on.change("public.pairs", name="others")
    async def others(change: Change, session: AsyncSession, context: Context) -> None:
        seen.append(("others", await note(session, context, 1)))

    async with bench(shared) as at:
        await at.load(on)
        cache = Cache(at.redis, secrets.token_hex(8), cached_tables(one.function for one in at.handlers))
        names = ("rows", "groups", "others", "cache:public.items")
        drains = {name: at.drain(name, cache=cache) for name in names}

        async def written(old: str | None, new: str) -> None:
            statement = (
                "insert into items (id, grp, note) values (1, 1, $1) on conflict (id) do update set note = $1"
            )
            await at.db.execute(statement, new)
            await at.put("items", item(1, 1, new), None if old is None else item(1, 1, old))

        await written(None, "a")
        await at.settle(drains["rows"], drains["groups"])
        await written("a", "b")
        await at.settle(drains["rows"])
        await written("b", "c")
        await at.settle(drains["groups"])
        assert seen == [("rows", "a"), ("groups", "a"), ("rows", "b"), ("groups", "c")]
        # Who is called with nothing of the table has to wait for the handler that follows it.
        seen.clear()
        await at.db.execute("update items set note = 'd'")
        await at.put("items", item(1, 1, "d"), item(1, 1, "c"))
        await at.put("pairs", {"a": 1, "b": str(UUID(int=1)), "amount": 1})
        await at.settle(drains["others"])
        await at.settle(drains["cache:public.items"])
        await at.put("pairs", {"a": 2, "b": str(UUID(int=1)), "amount": 1})
        await at.settle(drains["others"])
        assert seen == [("others", "c"), ("others", "d")]
