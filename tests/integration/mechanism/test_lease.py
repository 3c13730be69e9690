"""The row of the source: whoever is frozen while he has it locked does not keep it."""

import asyncio

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench
from worker import Change, Handlers, lease
from worker.change import Position
from worker.database import is_away
from worker.reading import record


@pytest.fixture
async def at(at: Bench) -> Bench:
    on = Handlers()

    @on.change("items", name="one")
    async def one(change: Change, session: AsyncSession) -> None:
        """Nothing is done here."""

    await at.load(on)
    return at


async def test_a_listener_frozen_in_a_transaction_does_not_keep_the_lease_from_the_next(at: Bench) -> None:
    async with at.engine.connect() as frozen:
        await lease.set_generation(frozen, at.token, "of the frozen", Position(1, -1))
        await at.db.execute("select 1")
        taker = asyncio.create_task(lease.renew(at.engine, at.token, None))
        async with asyncio.timeout(60):
            await taker  # the row was locked: it had to wait until Postgres ended the other
        with pytest.raises(DBAPIError) as ended:
            await frozen.execute(text("select 1"))
        assert is_away(ended.value), "whoever wakes up waits and begins anew, and does not end"
        await frozen.invalidate()
    assert await at.count("tailrace.source where generation = 'of the frozen'") == 0


async def test_a_listener_frozen_within_a_statement_does_not_keep_the_lease_from_the_next(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_MS", 100)
    monkeypatch.setattr(lease, "_WAIT_BRIEFLY", text("set local lock_timeout = 50"))
    await at.db.execute("update tailrace.source set lease_until = '-infinity'")
    async with at.session() as frozen:
        await frozen.execute("begin; update tailrace.source set floor_lsn = 77")
        await frozen.prepare("select 1")  # and never runs it
        async with asyncio.timeout(60):
            while not await lease.take(at.engine, lease.new_name(), "next"):
                pass
    assert await at.count("tailrace.source where floor_lsn = 77") == 0


async def test_each_transaction_that_locks_the_row_says_when_it_is_to_end(at: Bench) -> None:
    limits: list[str] = []

    def look(connection: Connection) -> None:
        found = connection.exec_driver_sql("show idle_in_transaction_session_timeout")
        limits.append(found.scalar_one())

    event.listen(at.engine.sync_engine, "commit", look)
    await lease.renew(at.engine, at.token, None)  # one statement: there is no transaction to be frozen in
    await record.set_target(at.engine, at.token, 7)
    async with at.engine.begin() as connection:
        await lease.live_since(connection)  # with it, every reading begins
    await lease.give_up(at.engine, at.token, None)
    assert await lease.take(at.engine, lease.new_name(), "next")
    event.remove(at.engine.sync_engine, "commit", look)
    assert limits == [f"{lease.IDLE_MS // 1000}s"] * 4
