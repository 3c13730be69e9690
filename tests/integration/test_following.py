"""At debug a change is followed by its position, from the listener to what became of it."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e import shop as handlers
from tests.stack import Process, Project, Servers, project

SLOT = "followed"


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    settings = {
        "WORKER_DELIVERY": "proven",
        "WORKER_SLOT": SLOT,
        "WORKER_LOG_LEVEL": "debug",
        "WORKER_BACKOFF_SECONDS": "0.01",
        "WORKER_MAX_ATTEMPTS": "2",
    }
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as made:
        yield made
        await made.kill_all(SLOT)


def about(process: Process, position: str) -> list[dict[str, object]]:
    return [line for line in process.lines if line.get("position") == position]


async def test_a_change_is_followed_through_both_processes(shop: Project) -> None:
    listener, worker = await shop.listener(wait=False), await shop.worker()
    await listener.said("listening")
    await shop.db.execute("insert into orders (id, customer_id) values (1, 7)")
    await shop.db.execute("insert into derived_poison values (2)")
    await shop.db.execute("insert into orders (id, customer_id) values (2, 7)")
    await shop.until("select count(*) from derived_log", 1)
    await shop.until("select count(*) from tailrace.held where status = 'dead'", 1)
    read = [line for line in listener.lines if line["message"] == "change read"]
    good, bad = (str(line["position"]) for line in read)
    assert {str(line["table"]) for line in read} == {"public.orders"}
    assert set(read[0]["lanes"]) == {"totals", "log"}
    assert [line["message"] for line in about(listener, good)] == ["change read", "change written"]
    await worker.said("change passed", times=5)

    def fates(position: str) -> list[tuple[object, object]]:
        lines = [line for line in about(worker, position) if line["message"] == "change passed"]
        return sorted((line["handler"], line["fate"]) for line in lines)

    assert fates(good) == [("log", "applied"), ("totals", "applied")]
    assert fates(bad) == [("log", "dead"), ("log", "held"), ("totals", "applied")]
    failed = [line for line in about(worker, bad) if line["message"] == "handler failed"]
    assert [line["retry_in_seconds"] is None for line in failed] == [False, True]
