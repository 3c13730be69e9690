"""What listener and worker tell Prometheus is what has happened."""

from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e import failing_handlers
from tests.e2e.test_failing import QUICK, write
from tests.e2e.test_proven import drop_slot, ready
from tests.stack import Process, Project, Servers, project

Found = dict[tuple[str, ...], float]


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(shared, failing_handlers.TABLES, "tests.e2e.failing_handlers", **QUICK) as made:
        yield made
        await drop_slot(made)


async def scrape(shop: Project, process: Process) -> Found:
    answer = await shop.get(process, "/metrics")
    assert answer.status_code == 200
    return {
        (one.name, *(value for label, value in sorted(one.labels.items()) if label != "version")): one.value
        for family in text_string_to_metric_families(answer.text)
        for one in family.samples
    }


async def until_told(shop: Project, process: Process, what: tuple[str, ...], value: float) -> Found:
    """Scrape until a number is there: an answer is kept for a second."""
    for _ in range(2_000):
        found = await scrape(shop, process)
        if found.get(what) == value:
            return found
    raise AssertionError(f"{what} is {found.get(what)}, not {value}")


async def test_what_was_written_applied_and_given_up_is_told(shop: Project) -> None:
    await ready(shop)
    listener = shop.processes[0]
    worker = await shop.worker(WORKER_HEALTH_PORT="0")
    await write(shop, ["new"] * 40 + ["poison"] * 2, customers=42)
    await shop.until("select count(*) from tailrace.held where status = 'dead'", 2)
    await shop.until("select count(*) from derived_log", 40)

    told = await until_told(shop, listener, ("tailrace_changes_dead", "log"), 2)
    assert told["tailrace_changes_read_total", "log"] == 42
    assert told["tailrace_changes_applied_total", "log"] == 40
    assert told["tailrace_changes_held", "log"] == told["tailrace_changes_queued", "log"] == 0
    # Labels in the order of their names: error_class, handler, status.
    failing = ("ValueError", "log", "dead")
    assert (told["tailrace_failing_changes", *failing], told["tailrace_failing_attempts", *failing]) == (2, 6)
    assert told["tailrace_failing_oldest_seconds", *failing] > 0
    assert told["tailrace_leader",] == told["tailrace_state_readable",] == 1
    assert told["tailrace_gaps_open",] == 0
    assert told["tailrace_slot_wal_status", "reserved"] + told["tailrace_slot_wal_status", "extended"] == 1
    assert told["tailrace_slot_retained_bytes",] > 0
    assert told["tailrace_workers",] == 1
    await until_told(shop, listener, ("tailrace_realtime_subscribed",), 1)

    told = await until_told(shop, worker, ("tailrace_worker_applied_total", "log"), 40)
    assert told["tailrace_pass_changes_sum", "log"] >= 42
    assert (
        told["tailrace_pass_duration_seconds_count", "log"] == told["tailrace_pass_changes_count", "log"] > 0
    )
    assert told["tailrace_worker_failures_total", "ValueError", "log"] == 2 * 3
    assert told["tailrace_worker_retries_total", "log"] == 2 * 2
    assert told["tailrace_info", "worker"] == told["tailrace_ready",] == 1


async def test_canaries_are_timed_by_both_ways(shop: Project) -> None:
    listener = await shop.listener()
    found: Found = {}
    while not {("tailrace_canary_lag_seconds", source) for source in ("wal", "realtime")} <= found.keys():
        found = await scrape(shop, listener)
    assert found["tailrace_source_lag_bytes", "wal"] >= 0
    assert found["tailrace_realtime_connections_total",] >= 1


async def test_a_listener_on_stand_by_leaves_the_telling_to_the_other(shop: Project) -> None:
    await ready(shop)
    second = await shop.listener(wait=False)
    await second.said("standing by")
    found = await scrape(shop, second)
    assert (found["tailrace_leader",], found["tailrace_ready",]) == (0, 0)
    assert not any(name.startswith(("tailrace_changes", "tailrace_slot")) for name, *_ in found)
