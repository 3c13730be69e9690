"""A backfill while the log is read again: the lanes are further than the reading."""

import asyncio
from collections.abc import Sequence

import pytest

from tests.e2e import shop
from tests.integration.mechanism.bench import make_drain
from tests.integration.wal.listening import Listening, choose, listening
from tests.stack import DEADLINE_SECONDS, Servers, project
from worker import Handlers
from worker.lanes import Lane
from worker.reading.intake import Intake
from worker.reading.journal import Journal
from worker.registry import Handler
from worker.schema_watch import SchemaWatch

LANES = 2
CUSTOMERS = list(range(1, 6))

on = Handlers()
on.derive("public.orders", by="customer_id", name="totals")(shop.totals)


class Waits:
    """Has a reading wait behind its first whole commits until a backfill gives keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._outside, self._given = asyncio.Event(), asyncio.Event()
        until_room, put_keys, outside = Intake.until_room, Intake.put_keys, Journal.outside

        async def waits(intake: Intake) -> None:
            if self._outside.is_set():
                await self._given.wait()
            await until_room(intake)

        async def gives(intake: Intake, handler: Handler, keys: Sequence[bytes]) -> None:
            self._given.set()
            await put_keys(intake, handler, keys)

        def notes(journal: Journal) -> None:
            self._outside.set()
            outside(journal)

        monkeypatch.setattr(Intake, "until_room", waits)
        monkeypatch.setattr(Intake, "put_keys", gives)
        monkeypatch.setattr(Journal, "outside", notes)


async def test_keys_of_a_backfill_are_never_below_what_the_lanes_have_passed(
    shared: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be passed over as if they had been computed."""
    choose(monkeypatch, "windows")
    monkeypatch.setattr("worker.wal.windows._WINDOW_BYTES", 1)  # a few commits at a time
    environment = {"WORKER_DELIVERY": "proven", "WORKER_LANES": str(LANES)}
    async with (
        project(shared, shop.TABLES, "tests.e2e.shop", **environment) as made,
        listening(made, on.handlers()) as reading,
        asyncio.timeout(3 * DEADLINE_SECONDS),
    ):
        for customer in CUSTOMERS:
            await made.db.execute("insert into orders (customer_id, amount) values ($1, 1)", customer)
        await drained(reading, f"select count(*) = {len(CUSTOMERS)} from derived_totals")
        await made.db.execute("truncate derived_totals")
        await made.db.execute(
            "insert into tailrace.backfills (handler, schema_name, table_name)"
            " values ('totals', 'public', 'orders')"
        )
        Waits(monkeypatch)
        await reading.start_again()
        await drained(reading, "select state = 'done' from tailrace.backfills")
        found = await made.db.fetch("select customer_id from derived_totals order by 1")
        assert [row[0] for row in found] == CUSTOMERS


async def drained(at: Listening, query: str) -> None:
    """Make passes over all lanes until something is so."""
    ground = at.ground
    watch = SchemaWatch(ground.engine, ground.catalogue, ground.settings.publication, ground.tables)
    drain = make_drain(on.handlers()[0], ground.engine, ground.lanes, watch)
    while not await at.project.db.fetchval(query):
        for number in range(LANES):
            await drain.run(Lane("totals", number))
        await asyncio.sleep(0.01)
