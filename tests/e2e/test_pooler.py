"""Proven delivery where nothing but a transaction-mode pooler can be reached: the log is read in windows."""

import shutil
from collections.abc import AsyncIterator

import pytest

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.integration.wal.pooler import pooled
from tests.stack import Project, Servers, project

SLOT = "behind_a_pooler"


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    settings = {"WORKER_DELIVERY": "proven", "WORKER_SLOT": SLOT}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as made:
        async with pooled(made.database_url, size=20) as url:
            made.environment["DATABASE_URL"] = url
            yield made
            for process in made.processes:
                await process.kill()
                assert "Traceback" not in process.text
        of_slot = f"from pg_replication_slots where slot_name = '{SLOT}'"
        await made.until(f"select count(*) {of_slot} and active", 0)
        await made.db.execute(f"select pg_drop_replication_slot(slot_name) {of_slot}")


async def settled(shop: Project, writer: Writer) -> None:
    await shop.until("select count(*) from derived_log", writer.committed, 60)
    await shop.until(DIFFERENCES, 0, 60)
    assert await logged(shop.db) == writer.history
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0


async def test_everything_arrives_through_a_pooler_in_transaction_mode(shop: Project) -> None:
    listener = await shop.listener(wait=False)
    await listener.said("listening")
    await shop.worker()
    writer = Writer(shop, seed=31)
    await writer.write(400)
    await settled(shop, writer)
    await shop.until("select count(*) > 0 from tailrace.source where slot_target is not null", value=True)
    status = (await shop.get(listener, "/status")).json()
    assert status["slot"]["transport"] == "windows"
    await listener.kill()
    await writer.write(200)
    # One transaction that is larger than a window is read at once.
    await shop.db.execute(
        "insert into orders (id, customer_id, amount) select n, 1, 1 from generate_series(1000, 3999) n"
    )
    again = await shop.listener(wait=False)
    await again.said("listening")
    await shop.until("select count(*) from derived_log where order_id >= 1000", 3000, 60)
    await shop.until(DIFFERENCES, 0, 60)
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
