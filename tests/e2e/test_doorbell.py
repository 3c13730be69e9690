"""Realtime in proven delivery: it rings and is compared with the log, and nothing depends on it."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.stack import DEADLINE_SECONDS, Process, Project, Servers, project

SLOT = "doorbell"
CANARY = "select token from tailrace.canary"


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    settings = {"WORKER_DELIVERY": "auto", "WORKER_SLOT": SLOT}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as made:
        yield made
        for process in made.processes:
            await process.kill()
        await made.until(
            f"select count(*) from pg_replication_slots where slot_name = '{SLOT}' and active", 0
        )
        await made.db.execute(
            f"select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '{SLOT}'"
        )


async def status(shop: Project, listener: Process) -> dict[str, Any]:
    answer: dict[str, Any] = (await shop.get(listener, "/status")).json()
    return answer


async def shows(shop: Project, listener: Process, name: str, *values: object) -> dict[str, Any]:
    """Wait until Realtime's part of the status shows one of these values."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (found := await status(shop, listener))["realtime"][name] not in values:
            await asyncio.sleep(0.1)
    return found


async def another_canary(shop: Project) -> str:
    before = await shop.db.fetchval(CANARY)
    await shop.until(f"select token <> '{before}' from tailrace.canary", value=True)
    token: str = await shop.db.fetchval(CANARY)
    return token


async def counting(shop: Project, listener: Process) -> None:
    """Wait until changes are compared: a canary that was written after the subscription is back."""
    await listener.said("subscribed")
    for _ in range(3):
        await another_canary(shop)
    before = (await status(shop, listener))["realtime"]["canary_seconds"]
    assert before is not None


async def burst(shop: Project) -> tuple[int, int]:
    """Write 400 changes between two canaries while Realtime drops and doubles; returns how many of them."""
    counters, faults = shop.standin.counters, shop.standin.faults
    canary = await another_canary(shop)
    await asyncio.sleep(0.7)  # the canary itself passes untouched; it is told apart below where it does not
    seen, sent = counters["changes"], counters["changes_sent"]
    dropped, doubled = counters["dropped"], counters["duplicated"]
    faults.drop, faults.duplicate = 0.1, 0.1
    for customer in range(4):
        await shop.db.execute(
            "insert into orders (customer_id, amount) select $1, 1 from generate_series(1, 100)", customer
        )
    await counters.reach("changes", seen + 400)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (counters["changes_sent"] - sent + counters["dropped"] - dropped) < 400 + counters[
            "duplicated"
        ] - doubled:
            await asyncio.sleep(0.01)
    faults.drop = faults.duplicate = 0.0
    assert await shop.db.fetchval(CANARY) == canary, "a canary was among them: nobody knows its fate"
    return counters["dropped"] - dropped, counters["duplicated"] - doubled


async def test_what_realtime_leaves_out_and_sends_twice_is_counted_exactly(shop: Project) -> None:
    listener = await shop.listener(WORKER_CANARY_SECONDS="4")
    await shop.worker()
    await counting(shop, listener)
    dropped, doubled = await burst(shop)
    assert dropped > 0
    assert doubled > 0
    await shows(shop, listener, "missed", dropped)
    found = await shows(shop, listener, "extra", doubled)
    assert found["realtime"]["missed"] == dropped
    await shop.until("select count(*) from derived_log", 400)
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
    assert 0 < found["slot"]["lag_seconds"] < found["realtime"]["lag_seconds"] < DEADLINE_SECONDS


async def test_proven_delivery_is_chosen_where_it_can_be_had_and_says_why(shop: Project) -> None:
    listener = await shop.listener()
    said = await listener.said("listening")
    assert said["delivery"] == "proven"
    why = "WORKER_DELIVERY=auto: the database allows the replication slot"
    assert said["reason"] == why
    assert (await status(shop, listener))["reason"] == why
    ready = (await shop.get(listener, "/readyz")).json()
    assert f"proven delivery: {why}" in ready["notes"]
    _, output = await shop.run("check")
    assert why in " ".join(output.split())


async def test_a_user_without_replication_gets_plain_delivery_and_is_told_why(shop: Project) -> None:
    name = f"poor_{shop.database_url.rpartition('_')[2]}"
    await shop.db.execute(
        f"create role {name} login bypassrls password 'x';"
        f" grant all on schema tailrace, public to {name};"
        f" grant all on all tables in schema tailrace, public to {name};"
        f" grant all on all sequences in schema tailrace, public to {name}"
    )
    url = shop.database_url.replace("postgres:postgres@", f"{name}:x@")
    try:
        listener = await shop.listener(DATABASE_URL=url)
        said = await listener.said("listening")
        assert said["delivery"] == "plain"
        assert f'alter role "{name}" replication' in said["reason"]
        found = await status(shop, listener)
        assert found["reason"] == said["reason"]
        assert (found["realtime"]["missed"], found["realtime"]["extra"]) == (None, None)
        assert said["reason"] in (await shop.get(listener, "/readyz")).json()["notes"][0]
        await listener.terminate()
        refused = await shop.listener(wait=False, DATABASE_URL=url, WORKER_DELIVERY="proven")
        assert await refused.ended() == 2
        assert f'alter role "{name}" replication' in refused.text.replace('\\"', '"')
    finally:
        await shop.db.execute(f"drop owned by {name}; drop role {name}")


async def test_a_silent_realtime_is_replaced_and_nobody_is_unready(shop: Project) -> None:
    listener = await shop.listener()
    await shop.worker()
    await counting(shop, listener)
    shop.standin.faults.silent = "current"
    await shop.db.execute("insert into orders (customer_id, amount) values (1, 10)")
    await shop.until("select count(*) from derived_log", 1)
    async with asyncio.timeout(30):
        while not any("no connection to Realtime" in str(line["message"]) for line in listener.lines):
            assert (await shop.get(listener, "/readyz")).status_code == 200
            await asyncio.sleep(0.2)
    await listener.said("subscribed", times=2)
    await shows(shop, listener, "missed", 1)
    assert (await status(shop, listener))["realtime"]["extra"] == 0
    assert not [line for line in listener.lines if "gap" in str(line["message"])]
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0


async def test_a_standby_takes_over_and_a_frozen_listener_does_no_harm(shop: Project) -> None:
    first = await shop.listener()
    await shop.worker()
    second = await shop.listener(wait=False)
    await second.said("standing by")
    await shop.db.execute("insert into orders (id, customer_id, amount) values (1, 1, 10)")
    await shop.until("select count(*) from derived_log", 1)
    await first.kill()
    await second.said("listening", seconds=10)
    third = await shop.listener(wait=False)
    await third.said("standing by")
    second.process.send_signal(signal.SIGSTOP)
    try:
        await shop.db.execute("insert into orders (id, customer_id, amount) values (2, 1, 10)")
        await third.said("listening", seconds=15)
        await shop.until("select count(*) from derived_log", 2)
    finally:
        second.process.send_signal(signal.SIGCONT)
    await second.said("another listener has taken over")
    await shop.db.execute("update orders set amount = 20, version = 1")
    await shop.until("select count(*) from derived_log", 4)
    await shop.until(DIFFERENCES, 0)
    assert await shop.db.fetchval("select count(distinct (order_id, version)) from derived_log") == 4
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
    assert second.process.returncode is None
