"""What the listener writes itself is in the log it reads: it must be no reason to write more."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.e2e import shop
from tests.integration.wal.bench import Kind
from tests.integration.wal.listening import Listening, choose, listening
from tests.stack import DEADLINE_SECONDS, Servers, project

EVERYTHING = """
drop publication supabase_realtime;
create publication supabase_realtime for all tables;
create table elsewhere (id int);
"""


@pytest.fixture
async def own(shared: Servers, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listening]:
    choose(monkeypatch, kind)
    # What is due is due at once, and what may wait while nothing happens waits for longer than the test.
    monkeypatch.setattr("worker.reading.proven.ADVANCE_SECONDS", 0.0)
    monkeypatch.setattr("worker.reading.proven.IDLE_ADVANCE_SECONDS", 3600.0)
    environment = {"WORKER_DELIVERY": "proven", "WORKER_CANARY_SECONDS": "10"}
    async with project(shared, shop.TABLES, "tests.e2e.shop", **environment) as made:
        await made.db.execute(EVERYTHING)
        async with listening(made, shop.on.handlers()) as one:
            yield one


async def test_own_writes_are_no_reason_to_write(own: Listening) -> None:
    await own.caught_up()
    before = await own.confirmed()
    with own.written() as written:
        for _ in range(5):
            await own.write()
            written.clear()
            await own.caught_up()
            assert written == []
    assert await own.confirmed() == before
    # Others' commits are one, though no handler wants them: the log must not be kept for ever.
    await own.project.db.execute("insert into elsewhere values (1)")
    await own.caught_up()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await own.confirmed() == before:
            await own.reading.tick()
