"""The slot in trouble: in danger, lost, slow to be made. Told at each step, and no process ends."""

import asyncio
import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.test_proven import PROVEN, drop_slot, ready
from tests.stack import DEADLINE_SECONDS, Project, project, servers

STATUS = "select wal_status from pg_replication_slots where slot_name = 'tailrace'"


@pytest.fixture
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    async with (
        servers(tmp_path_factory.mktemp("slot"), max_slot_wal_keep_size="64MB") as own,
        project(own, handlers.TABLES, "tests.e2e.shop", **PROVEN) as made,
    ):
        yield made
        await drop_slot(made)


async def fill_the_log(shop: Project, customer: int, segments: int) -> None:
    """Write so many segments of the log, with an order in each."""
    for _ in range(segments):
        await shop.db.execute("insert into orders (customer_id, amount) values ($1, 1)", customer)
        await shop.db.execute("select pg_switch_wal()")


async def test_a_slot_that_loses_its_log_is_told_before_made_anew_and_backfilled(shop: Project) -> None:
    await ready(shop)
    listener = shop.processes[0]
    await fill_the_log(shop, 1, 5)  # nobody works: the slot cannot move
    await listener.said("the replication slot is in danger")
    answer = await shop.get(listener, "/readyz")
    assert answer.status_code == 503
    assert any("the replication slot keeps" in reason for reason in answer.json()["reasons"])
    assert (await shop.get(listener, "/status")).json()["slot"]["safe_bytes"] is not None
    listener.process.send_signal(signal.SIGSTOP)
    await fill_the_log(shop, 2, 4)
    await shop.db.execute("checkpoint")
    await shop.until(STATUS, "lost")
    listener.process.send_signal(signal.SIGCONT)
    await listener.said("slot made", times=2)
    await shop.worker()
    await shop.until(DIFFERENCES, 0)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (answer := await shop.get(listener, "/readyz")).status_code != 200:
            await asyncio.sleep(0.1)
    assert any("has lost the log it needs" in note for note in answer.json()["notes"])
    (gap,) = (await shop.get(listener, "/status")).json()["gaps"]
    assert "has lost the log it needs" in gap["cause"]
    assert await shop.db.fetchval("select count(*) from orders") == 9
    assert listener.process.returncode is None


async def test_the_lease_is_kept_while_the_slot_waits_for_an_open_transaction(shop: Project) -> None:
    other = await asyncpg.connect(shop.database_url)
    await other.execute("begin; insert into orders (customer_id, amount) values (1, 1)")
    first = await shop.listener(wait=False)
    await first.said("the start takes long")
    second = await shop.listener(wait=False)
    await second.said("standing by")
    # Longer than a lease lasts: only one that is renewed goes so far.
    held = "select lease_until from tailrace.source"
    until = await shop.db.fetchval(held)
    await shop.until(
        f"select lease_until > timestamptz '{until}' + interval '9 s' from tailrace.source", value=True
    )
    await other.execute("commit")
    await other.close()
    await first.said("listening")
    assert not [line for line in second.lines if line["message"] == "listening"]
    assert (await shop.get(second, "/readyz")).status_code == 503
