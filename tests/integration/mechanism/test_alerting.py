"""Hooks for dead letters: told at least once, whatever they do."""

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, _no_client, item
from worker import Change, Context, DeadLetter, GiveUp, Handlers
from worker.draining.alerting import Alerting
from worker.errors import ConfigurationError
from worker.registry import Handler


class Shop:
    def __init__(self) -> None:
        self.told: list[DeadLetter] = []
        self.contexts: list[Context] = []
        self.fails = False
        self.on = Handlers()

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            await session.execute(text("select 1"))
            raise GiveUp("never")

        @self.on.derive("items", name="sums", by="grp")
        async def sums(groups: list[int], session: AsyncSession) -> None:
            await session.execute(text("select 1"))
            raise GiveUp("never")

        @self.on.dead_letter
        async def alert(letter: DeadLetter) -> None:
            if self.fails:
                raise SystemExit
            self.told.append(letter)

        @self.on.dead_letter
        async def with_context(letter: DeadLetter, context: Context) -> None:
            context.log.info("heard", letter=letter.id)
            self.contexts.append(context)


def alerting(at: Bench) -> Alerting:
    def context(_: Handler) -> Context:
        return Context(at.redis, structlog.get_logger(), None, _no_client)

    return Alerting(at.engine, at.handlers, context)


async def given_up(at: Bench, handler: str) -> None:
    await at.drain(handler).run(at.lane_of(handler, item(1, 7)))


async def test_each_dead_letter_is_told_once_with_what_a_person_needs(at: Bench) -> None:
    shop = Shop()
    await at.load(shop.on)
    await at.put("items", item(1, 7, "a"))
    for handler in ("one", "sums"):
        await given_up(at, handler)
    telling = alerting(at)
    assert telling.needed
    assert await telling.once() == 2
    assert await telling.once() == 0
    assert await alerting(at).once() == 0
    change, key = sorted(shop.told, key=lambda letter: letter.handler)
    assert (change.handler, change.type, change.schema, change.table) == ("one", "INSERT", "public", "items")
    assert (change.key, change.attempts, change.error) == ((1,), 1, "never")
    assert change.error_class == "worker.errors.GiveUp"
    assert change.hint
    assert (key.handler, key.type, key.key) == ("sums", None, ("7",))
    assert len(shop.contexts) == 2


async def test_what_a_hook_could_not_tell_is_told_later(at: Bench) -> None:
    shop = Shop()
    await at.load(shop.on)
    await at.put("items", item(1, 7, "a"))
    await given_up(at, "one")
    shop.fails = True
    telling = alerting(at)
    assert await telling.once() == 0
    assert await at.count("tailrace.held where told_at is null") == 1
    shop.fails = False
    assert await telling.once() == 0  # not at once again
    assert await alerting(at).once() == 1
    assert len(shop.told) == 1


async def test_without_hooks_there_is_nothing_to_do(at: Bench) -> None:
    on = Handlers()

    @on.change("items", name="one")
    async def one(change: Change, session: AsyncSession) -> None: ...

    await at.load(on)
    assert not alerting(at).needed


def test_a_hook_that_cannot_be_called_is_told_at_the_start() -> None:
    on = Handlers()

    @on.change("items", name="one")
    async def one(change: Change, session: AsyncSession) -> None: ...

    def not_async(letter: DeadLetter) -> None: ...

    async def nothing() -> None: ...

    on.dead_letter(not_async)  # type: ignore[type-var]
    on.dead_letter(nothing)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError) as raised:
        on.handlers()
    assert len(raised.value.problems) == 2
    assert "must be a coroutine function" in raised.value.problems[0]
    assert "wrong signature" in raised.value.problems[1]
