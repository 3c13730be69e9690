"""A transaction larger than all that may be in the lanes: Redis stays within its bounds, nothing is lost."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.e2e import shop
from tests.integration.mechanism.bench import make_drain
from tests.integration.wal.bench import Kind
from tests.integration.wal.listening import Listening, choose, listening
from tests.stack import DEADLINE_SECONDS, Servers, project
from worker import Change, Handlers
from worker.lanes import Lane
from worker.schema_watch import SchemaWatch

MOST = 2_000
"""Entries in all lanes together."""
AT_ONCE = 1_000
"""Changes that a reader hands over at once: the bound is looked at before each."""
KEYS, VERSIONS = 200, 100
LARGE = 3_000_000
TRANSACTION = f"""
do $$ begin
  insert into orders (id, customer_id) select n, 1 from generate_series(1, {KEYS}) n;
  for number in 1..{VERSIONS - 1} loop
    if number = 50 then
      insert into orders (id, customer_id, status) values (-1, 1, repeat('x', {LARGE}));
    end if;
    update orders set version = number where id > 0;
  end loop;
end $$
"""

on = Handlers()


@on.change("public.orders", name="log", batch=500)
async def log(changes: list[Change], session: AsyncSession) -> None:
    rows = [(change.type, change.record) for change in changes]
    await session.execute(
        text(
            "insert into derived_log (order_id, type, version, attempt, position)"
            " values (:id, :type, :version, 1, :size)"
        ),
        [
            {"id": row["id"], "type": kind, "version": row["version"], "size": str(len(row["status"]))}
            for kind, row in rows
            if row is not None
        ],
    )


@pytest.fixture
async def small(shared: Servers, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listening]:
    choose(monkeypatch, kind)
    monkeypatch.setattr("worker.reading.proven.ADVANCE_SECONDS", 0.0)
    monkeypatch.setattr("worker.reading.intake.FULL_SECONDS", 0.01)
    environment = {"WORKER_DELIVERY": "proven", "WORKER_MAX_BACKLOG": str(MOST), "WORKER_LANES": "4"}
    async with (
        project(shared, shop.TABLES, "tests.e2e.shop", **environment) as made,
        listening(made, on.handlers()) as one,
    ):
        yield one


class Lanes:
    """What the lanes hold: looked at after every batch that is written."""

    def __init__(self, at: Listening) -> None:
        self._lanes = at.ground.lanes
        self._at = at
        self.most = 0
        self.looks = 0
        self._add, self._park = self._lanes.add_script, self._lanes.passed
        self._lanes.add_script = self._written  # type: ignore[assignment] # only called
        self._lanes.passed = self._looked  # type: ignore[method-assign]

    async def _written(self, **named: Any) -> Any:
        answer = await self._add(**named)
        self.most = max(self.most, await self.hold())
        return answer

    async def _looked(self, generation: str) -> Any:
        self.looks += 1
        return await self._park(generation)

    async def hold(self) -> int:
        """Count entries."""
        journal = self._at.reading.journal
        assert journal is not None
        generation = journal.generation
        keys = [self._lanes.key(generation, Lane("log", number)) for number in range(4)]
        return sum([await self._lanes.redis.xlen(key) for key in keys])

    async def full(self) -> None:
        """Wait until reading has stopped: it looks for room, again and again."""
        while await self.hold() < MOST:
            await asyncio.sleep(0.01)
        looks = self.looks
        while self.looks < looks + 5 and self.most <= MOST + AT_ONCE:
            await asyncio.sleep(0.01)


async def test_one_transaction_larger_than_the_lanes_may_be(small: Listening) -> None:
    await small.caught_up()
    before = await small.confirmed()
    lanes = Lanes(small)
    async with asyncio.timeout(5 * DEADLINE_SECONDS):
        await small.project.db.execute(TRANSACTION)
        await lanes.full()
        assert lanes.most <= MOST + AT_ONCE
        await small.reading.tick()
        assert await small.confirmed() == before, "a part of it is in the lanes"
        await drained(small)
    assert lanes.most <= MOST + AT_ONCE
    rows = await small.project.db.fetch(
        "select order_id, type, version, position from derived_log order by seq"
    )
    seen: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for row in rows:
        seen[row["order_id"]].append((row["type"], row["version"]))
    history = [("INSERT", 0), *(("UPDATE", number) for number in range(1, VERSIONS))]
    assert seen == {-1: [("INSERT", 0)]} | dict.fromkeys(range(1, KEYS + 1), history)
    assert [row["position"] for row in rows if row["order_id"] == -1] == [str(LARGE)]
    for table in ("gaps", "held"):
        assert await small.project.db.fetchval(f"select count(*) from tailrace.{table}") == 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await small.confirmed() == before:
            await small.reading.tick()


async def drained(at: Listening) -> None:
    """Make passes over all lanes in turn until all of the transaction is applied."""
    (handler,) = at.ground.handlers
    ground = at.ground
    watch = SchemaWatch(ground.engine, ground.catalogue, ground.settings.publication, ground.tables)
    drain = make_drain(handler, ground.engine, ground.lanes, watch, timeout=30)
    applied = 0
    for number in itertools.cycle(range(4)):
        applied += (await drain.run(Lane(handler.name, number))).applied
        if applied == KEYS * VERSIONS + 1:
            return
