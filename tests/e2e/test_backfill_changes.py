"""`backfill --handler` of a change handler: rows that are there among live changes, in one order."""

import asyncio
import random
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest

from tests.e2e import mirror_handlers as handlers
from tests.e2e.backfilling import backfill
from tests.stack import SECRET, Process, Project, Servers, project

SLOT = "of_rows"
ROWS = 600
AHEAD = 40
"""Changes that writers are ahead of the handler, at most: the machine decides how many there are."""
SECONDS = 90.0
"""A machine under load needs longer to start processes again than others need for all of it."""
BEFORE = (
    "insert into items (shop, id, version, note, code, tags)"
    " select n % 3, n, n, 'before ' || n, 'c' || n % 50, array['a', null, 'ü']"
    " from generate_series(1, $1::int) n"
)


@pytest.fixture
async def shop(shared: Servers, request: pytest.FixtureRequest) -> AsyncIterator[Project]:
    delivery = getattr(request, "param", "proven")
    settings = {"WORKER_DELIVERY": delivery, "WORKER_SLOT": SLOT, "SUPABASE_JWT_SECRET": SECRET}
    settings["WORKER_LANES"] = "4"  # a row that moves to another key is a meeting of lanes
    async with project(shared, handlers.TABLES, "tests.e2e.mirror_handlers", **settings) as made:
        await made.db.execute(BEFORE, ROWS)
        yield made
        await made.kill_all(SLOT)


async def listening(shop: Project) -> Process:
    process = await shop.listener(wait=False)
    await process.said("listening", seconds=SECONDS)
    return process


class Writer:
    """Changes rows as applications do: one or several, keys too, some rolled back, some held for long."""

    def __init__(self, url: str, seed: int, written: Counter[str]) -> None:
        self._url = url
        self._chance = random.Random(seed)
        self._version = seed * 1_000_000
        self._written = written

    async def write(self) -> None:
        """Write until cancelled. A deadlock, which only the backfill could bring about, is an error."""
        db = await asyncpg.connect(self._url)
        applied = "select count(*) from derived_log where handler = 'copy' and source = 'wal'"
        try:
            while True:
                while self._written["changes"] > AHEAD + await db.fetchval(applied):
                    await asyncio.sleep(0.05)
                transaction = db.transaction()
                await transaction.start()
                # Several rows in the order of their keys, so that writers have no deadlocks among themselves.
                changes = 0
                for key in sorted(self._keys()):
                    changes += await self._change(db, key)
                if self._chance.random() < 0.05:
                    await asyncio.sleep(0.2)
                if self._chance.random() < 0.9:
                    await transaction.commit()
                    self._written["changes"] += changes
                else:
                    await transaction.rollback()
        finally:
            await db.close()

    def _keys(self) -> set[tuple[int, int]]:
        count = self._chance.choice((1, 1, 1, 5))
        numbers = [self._chance.randrange(1, ROWS + 200) for _ in range(count)]
        return {(number % 3, number) for number in numbers}

    async def _change(self, db: asyncpg.Connection, key: tuple[int, int]) -> int:
        self._version += 1
        chance = self._chance.random()
        if chance < 0.1:
            said = await db.execute("delete from items where shop = $1 and id = $2", *key)
        elif chance < 0.13:
            # To a key of nobody else's, before or behind what the backfill has read.
            said = await db.execute(
                "update items set id = $3, shop = $3 % 3, version = $3 where shop = $1 and id = $2",
                *key,
                self._version,
            )
        elif chance < 0.2:
            await db.execute("select from items where shop = $1 and id = $2 for update", *key)
            return 0
        else:
            said = await db.execute(
                "insert into items (shop, id, version, note) values ($1, $2, $3, 'live')"
                " on conflict (shop, id) do update set version = excluded.version",
                *key,
                self._version,
            )
        return int(said.split()[-1])


async def follow(db: asyncpg.Connection) -> Counter[str]:
    """Follow what the handler was given: each change must begin with what the one before it left.

    Returns how often each source gave something.
    """
    state: dict[tuple[int, int], int | None] = {}
    sources: Counter[str] = Counter()
    rows = await db.fetch("select * from derived_log where handler = 'copy' order by seq")
    for row in rows:
        key, old = (row["shop"], row["id"]), (row["old_shop"], row["old_id"])
        sources[row["source"]] += 1
        if row["source"] == "backfill":
            assert row["type"] == "INSERT"
            assert state.get(key, row["version"]) == row["version"], f"{key} came as it was at another time"
        else:
            assert row["source"] == "wal"
            if row["type"] == "INSERT":
                assert state.get(key) is None, f"{key} was inserted, and was there"
            else:
                assert state.get(old, row["old_version"]) == row["old_version"], f"{old} was not so before"
                state[old] = None
        if row["type"] != "DELETE":
            state[key] = row["version"]
    assert len({row["position"] for row in rows}) == len(rows), "a position came twice"
    return sources


async def once_each(db: asyncpg.Connection) -> None:
    """See that no row was read twice: one key comes by the backfill once at most."""
    twice = await db.fetch(
        "select handler, shop, id from derived_log where source = 'backfill'"
        " group by 1, 2, 3 having count(*) > 1"
    )
    assert twice == []


@pytest.mark.parametrize("seed", [1, 2])
async def test_rows_come_once_and_in_order_beside_live_changes_and_kills(shop: Project, seed: int) -> None:
    listener = await listening(shop)
    await shop.worker()
    written: Counter[str] = Counter()
    writers = [Writer(shop.database_url, number, written) for number in (seed, seed + 10)]
    writing = [asyncio.create_task(writer.write(), name="test: writer") for writer in writers]
    # The command is killed as it looks on; what it has asked for goes on.
    command = ("backfill", "items", "--handler", "copy", "--rate", "100", "--wait")
    asking = await shop.start(sys.executable, "-m", "worker", *command, name="backfill")
    await shop.until(
        "select count(*) > 0 from derived_log where source = 'backfill'", value=True, seconds=SECONDS
    )
    await asking.kill()
    await listener.kill()
    rows = await shop.db.fetchval("select rows from tailrace.backfills where state = 'running'")
    assert 0 < rows < ROWS
    listener = await listening(shop)
    await backfill(shop, "items", "--resume", "--rate", "100000", "--no-wait")
    await shop.until("select state from tailrace.backfills", "done", SECONDS)
    (done,) = await backfill(shop)
    for one in writing:
        assert not one.done(), one
        one.cancel()
    await asyncio.gather(*writing, return_exceptions=True)
    await shop.until(handlers.DIFFERENCES, 0, SECONDS)
    sources = await follow(shop.db)
    await once_each(shop.db)
    assert sources["backfill"] == done["rows"] > ROWS // 2
    assert sources["wal"] >= written["changes"] > AHEAD
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
    code, output = await shop.run("status", "--verify", "--json")
    assert code == 0, output


async def refused(shop: Project, *options: str) -> str:
    code, output = await shop.run("backfill", *options)
    assert code == 1, output
    (line,) = re.findall(r"^tailrace: (.*)$", output, re.MULTILINE)
    return str(line)


async def test_several_at_once_some_rows_alone_cancelled_and_over_http(shop: Project) -> None:
    listener = await listening(shop)
    await shop.worker()
    line = await refused(shop, "items")
    assert "only change handlers follow public.items: copy, odd" in line
    url = (await listener.said("health of the"))["url"]
    headers = {"Authorization": f"Bearer {shop.environment['SUPABASE_SERVICE_ROLE_KEY']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=30) as http:
        answer = await http.post("/backfills", json={"table": "items", "handler": "odd", "rate": 10})
        assert answer.status_code == 200, answer.text
    some = ("items", "--handler", "copy")
    (done,) = await backfill(shop, *some, "--where", "shop = 1 and note like '%0'", "--wait")
    tenth = await shop.db.fetchval("select count(*) from items where shop = 1 and note like '%0'")
    assert (done["state"], done["rows"]) == ("done", tenth)
    assert await shop.db.fetchval("select count(*) from derived_items") == tenth
    # The other one goes on at its rate; stopped, and it has given what it has given.
    (cancelled,) = await backfill(shop, "items", "--cancel")
    assert (cancelled["handler"], cancelled["state"]) == ("odd", "cancelled")
    assert 0 < cancelled["rows"] < ROWS
    (done,) = await backfill(shop, "items", "--resume", "--handler", "odd", "--rate", "100000", "--wait")
    assert (done["state"], done["rows"]) == ("done", ROWS)
    await shop.until("select count(*) from derived_log where handler = 'odd'", ROWS)
    twice = "select count(*) - count(distinct (shop, id)) from derived_log where handler = 'odd'"
    assert await shop.db.fetchval(twice) == 0
    assert (await shop.get(listener, "/status")).json()["backfills"] == []


@pytest.mark.parametrize("shop", ["plain"], indirect=True)
async def test_plain_delivery_refuses_it_in_one_line(shop: Project) -> None:
    await shop.listener()
    line = await refused(shop, "items", "--handler", "copy")
    assert "in plain delivery rows that are there have no place among live changes" in line
    assert await shop.db.fetchval("select count(*) from tailrace.backfills") == 0
