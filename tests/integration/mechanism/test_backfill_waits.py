"""A backfill begins only when every transaction that may have committed before it can be seen."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench
from worker import Handlers, lease
from worker.backfill import Backfills
from worker.registry import Handler


@pytest.fixture
async def other(at: Bench) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's connection."""
    url = at.engine.url.render_as_string(hide_password=False).replace("+asyncpg", "")
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def backfills(at: Bench, given: list[bytes]) -> Backfills:
    """Ask for the backfill of a derive handler; its keys go into a list."""
    on = Handlers()

    @on.derive("items", by="id", name="one")
    async def one(keys: list[int], session: AsyncSession) -> None:
        """Nothing is computed here."""

    await at.load(on)

    async def put(handler: Handler, keys: Sequence[bytes]) -> None:
        given.extend(keys)

    async def until_passed(handler: Handler) -> None:
        """Everything is applied at once here."""

    await at.db.execute(
        "insert into tailrace.backfills (handler, schema_name, table_name) values ('one', 'public', 'items')"
    )
    return Backfills(at.engine, at.handlers, at.catalogue, put, until_passed)


@contextmanager
def looks(at: Bench) -> Iterator[asyncio.Event]:
    """Tell when the backfill has looked twice for what it waits for: once in vain."""
    seen, twice = 0, asyncio.Event()

    def look(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal seen
        seen += "pg_snapshot_xmin" in statement
        if seen > 1:
            twice.set()

    event.listen(at.engine.sync_engine, "before_cursor_execute", look)
    try:
        yield twice
    finally:
        event.remove(at.engine.sync_engine, "before_cursor_execute", look)


async def test_a_backfill_waits_for_transactions_that_cannot_be_seen_yet(
    at: Bench, other: asyncpg.Connection
) -> None:
    given: list[bytes] = []
    asked = await backfills(at, given)
    await at.db.execute("insert into items values (1, 1)")
    # It may be in the log already, and below the place from which the log is read: nobody can tell.
    await other.execute("begin; insert into items values (2, 1)")
    with looks(at) as twice:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(asked.once(), name="test: backfill")
            looked = group.create_task(twice.wait(), name="test: looks")
            await asyncio.wait({running, looked}, return_when=asyncio.FIRST_COMPLETED)
            looked.cancel()
            assert not running.done(), "it began beside a transaction whose rows it does not see"
            assert given == []
            # What begins later is read from the log, and is not waited for.
            await at.db.execute("begin; insert into items values (3, 1)")
            await other.execute("commit")
            assert await running
    assert given == [b'["1"]', b'["2"]']
    await at.db.execute("rollback")


async def test_a_transaction_that_never_ends_holds_no_backfill_up_for_ever(
    at: Bench, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.backfill.VISIBLE_SECONDS", 0.3)
    given: list[bytes] = []
    asked = await backfills(at, given)
    await at.db.execute("insert into items values (1, 1)")
    await other.execute("begin; insert into items values (2, 1)")
    with looks(at) as twice:
        async with asyncio.timeout(30):
            assert await asked.once()
    assert twice.is_set()
    assert given == [b'["1"]']


async def test_tasks_that_look_for_backfills_ask_once_for_all_of_them(at: Bench) -> None:
    given: list[bytes] = []
    asked = await backfills(at, given)
    await at.db.execute("update tailrace.backfills set state = 'done'")
    looked = 0

    def look(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal looked
        looked += "tailrace.backfills" in statement

    event.listen(at.engine.sync_engine, "before_cursor_execute", look)
    assert await asyncio.gather(*(asked.once() for _ in range(3))) == [False] * 3
    assert looked == 1
    # Whoever is told that there is one looks at once.
    await at.db.execute("update tailrace.backfills set state = 'waiting'")
    asked.ask()
    assert await asked.once()


async def test_each_transaction_that_locks_a_backfill_says_when_it_is_to_end(at: Bench) -> None:
    """Who is frozen in one would keep the backfill from every later listener."""
    limits: list[str] = []

    def look(connection: Connection) -> None:
        found = connection.exec_driver_sql("show idle_in_transaction_session_timeout")
        limits.append(found.scalar_one())

    of_one = await backfills(at, [])
    event.listen(at.engine.sync_engine, "commit", look)
    assert await of_one.once()
    event.remove(at.engine.sync_engine, "commit", look)
    assert await at.count("tailrace.backfills where state = 'done'") == 1
    assert set(limits) == {f"{lease.IDLE_MS // 1000}s"}
