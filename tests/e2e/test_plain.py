"""Plain delivery end to end: real Postgres, real Redis, real websocket, the real processes."""

import asyncio
import random
import sys

import pytest

from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.stack import Project


async def settled(shop: Project, writer: Writer, seconds: float = 90) -> None:
    await shop.until("select count(*) from derived_log", writer.committed, seconds)
    await shop.until(DIFFERENCES, 0, seconds)
    assert await logged(shop.db) == writer.history


@pytest.mark.slow
async def test_twenty_thousand_commits_are_applied_once_and_in_order(shop: Project) -> None:
    await shop.listener()
    await shop.worker()
    writer = Writer(shop, seed=1)
    await writer.write(20_000)
    await settled(shop, writer)
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
    state = await shop.db.fetchrow(
        "select sum(applied) as applied, sum(holding) as holding from tailrace.lanes where handler = 'log'"
    )
    assert (state["applied"], state["holding"]) == (20_000, 0)


@pytest.mark.slow
async def test_workers_killed_ten_times_lose_double_and_reorder_nothing(shop: Project) -> None:
    listener = await shop.listener()
    worker = await shop.worker()
    chance = random.Random(2)
    writer = Writer(shop, seed=2)
    writing = asyncio.create_task(writer.write(20_000), name="test: writer")
    for number in range(10):
        # A random moment in the tenth of the work that is due, told by what has been applied.
        goal = number * 1_500 + chance.randrange(1_500)
        while await shop.db.fetchval("select count(*) from derived_log") < goal and not writing.done():
            await asyncio.sleep(0.01)
        await worker.kill()
        worker = await shop.worker()
    await writing
    await settled(shop, writer)
    assert listener.process.returncode is None
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0


@pytest.mark.slow
async def test_several_workers_share_the_lanes(shop: Project) -> None:
    await shop.listener()
    first = await shop.worker(WORKER_HEALTH_PORT="0")
    second = await shop.worker(WORKER_HEALTH_PORT="0")
    writer = Writer(shop, seed=3)
    await writer.write(8_000)
    await settled(shop, writer)
    done = [(await shop.get(worker, "/status")).json()["applied"] for worker in (first, second)]
    assert sum(done) >= 16_000
    assert min(done) > 0


async def test_lanes_of_a_killed_worker_are_taken_over(shop: Project) -> None:
    await shop.listener()
    writer = Writer(shop, seed=4)
    first = await shop.worker()
    await writer.write(50)
    await settled(shop, writer)
    # The first worker lingers at its lanes; the wake-ups of the next changes go to it alone.
    second = await shop.worker()
    await first.kill()
    await writer.write(200)
    await settled(shop, writer, seconds=10)
    assert second.process.returncode is None


async def test_sigterm_drains_and_ends_with_zero(shop: Project) -> None:
    listener = await shop.listener()
    worker = await shop.worker()
    writer = Writer(shop, seed=5)
    writing = asyncio.create_task(writer.write(3_000), name="test: writer")
    await shop.until("select count(*) > 300 from derived_log", value=True)
    assert await worker.terminate() == 0
    await writing
    worker = await shop.worker()
    await settled(shop, writer)
    assert await listener.terminate() == 0
    assert await worker.terminate() == 0


async def test_a_failing_change_holds_back_only_its_own_key(shop: Project) -> None:
    await shop.db.execute("insert into derived_poison values (7)")
    await shop.listener()
    worker = await shop.worker(WORKER_BACKOFF_SECONDS="0.1", WORKER_BACKOFF_MAX_SECONDS="0.5")
    for version in range(1, 6):
        await shop.db.execute(
            "insert into orders (id, customer_id, version) select n, 1, $1 from generate_series(1, 20) n"
            " on conflict (id) do update set version = excluded.version",
            version,
        )
    await shop.until("select count(*) from derived_log", 95)
    await shop.until("select attempts >= 2 from tailrace.held order by id limit 1", value=True)
    held = await shop.db.fetch("select keys, attempts from tailrace.held order by id")
    assert [row["keys"] for row in held] == [['["public.orders","7"]']] * 5
    assert held[0]["attempts"] >= 2
    assert [row["attempts"] for row in held[1:]] == [0] * 4
    await shop.db.execute("delete from derived_poison")
    await shop.until("select count(*) from derived_log", 100)
    log = await logged(shop.db)
    assert log[7] == [("INSERT", 1), ("UPDATE", 2), ("UPDATE", 3), ("UPDATE", 4), ("UPDATE", 5)]
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0
    assert "poison" not in worker.text


async def test_a_gap_is_recorded_and_closed_for_derive_handlers(shop: Project) -> None:
    listener = await shop.listener()
    await shop.worker()
    await shop.db.execute("insert into orders (id, customer_id, amount) values (1, 1, 10)")
    await shop.until(DIFFERENCES, 0)
    await listener.kill()
    await shop.db.execute("insert into orders (id, customer_id, amount) values (2, 2, 20)")
    await shop.listener()
    await shop.until("select orders from derived_totals where customer_id = 2", 1)
    gap = await shop.db.fetchrow("select cause, tables, state from tailrace.gaps")
    assert (gap["cause"], gap["tables"]) == ("the listener was not running", ["public.orders"])
    assert gap["state"] == "open"  # the change handler has missed the insert, and nobody can give it back
    assert await shop.db.fetchval("select count(*) from derived_log") == 1


async def test_a_second_listener_stands_by_and_takes_over(shop: Project) -> None:
    first = await shop.listener()
    second = await shop.listener(wait=False)
    await second.said("standing by")
    ready = await shop.get(second, "/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["standing by: another listener is active"])
    await shop.worker()
    await first.kill()
    await second.said("subscribed", seconds=10)
    await shop.db.execute("insert into orders (customer_id) values (3)")
    await shop.until("select count(*) from derived_log", 1)


async def test_health_of_both_processes(shop: Project) -> None:
    listener = await shop.listener()
    worker = await shop.worker(WORKER_HEALTH_PORT="0")
    await shop.db.execute("insert into orders (customer_id) values (3)")
    await shop.until("select count(*) from derived_log", 1)
    await shop.until("select count(*) from derived_totals", 1)
    for process in (listener, worker):
        assert (await shop.get(process, "/livez")).status_code == 200
    deadline = asyncio.get_running_loop().time() + 20
    while (ready := await shop.get(listener, "/readyz")).status_code != 200:  # until the canary is back
        assert asyncio.get_running_loop().time() < deadline, ready.text
        await asyncio.sleep(0.1)
    status = (await shop.get(listener, "/status")).json()
    assert status["delivery"] == "plain"
    assert status["ready"] is True
    assert status["realtime"]["subscribed"] is True
    assert status["handlers"]["log"]["applied"] == 1
    assert status["handlers"]["log"]["read"] == 1
    assert len(status["workers"]) == 1


async def test_arq_check_tells_the_truth(shop: Project) -> None:
    async def check() -> int:
        command = (sys.executable, "-m", "arq", "--check", "worker.jobs.WorkerSettings")
        return await (await shop.start(*command, name="check")).ended()

    assert await check() == 1
    worker = await shop.worker()
    assert await check() == 0
    await worker.terminate()
    assert await check() == 1


async def test_a_new_backend_at_realtimes_slot_is_a_gap(shop: Project) -> None:
    await shop.listener()
    await shop.until("select token <> 'none' from tailrace.canary", value=True)
    pid = (
        "select active_pid from pg_replication_slots"
        " where slot_name like 'supabase_realtime%' and database = current_database()"
    )
    before = await shop.db.fetchval(pid)
    canary = await shop.db.fetchval("select token from tailrace.canary")
    await shop.until(f"select token <> '{canary}' from tailrace.canary", value=True)
    await shop.db.execute("select pg_terminate_backend($1)", before)
    await shop.until(
        "select count(*) >= 1 from tailrace.gaps where cause like '%temporary slot%'", value=True
    )
