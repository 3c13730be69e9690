"""The same values by the other delivery: what the log carries comes exact, and is not read again."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e import test_types as plain
from tests.stack import Servers, project

SLOT = "types_proven"


@pytest.fixture(scope="module")
async def bench(shared: Servers) -> AsyncIterator[plain.Bench]:
    settings = {"WORKER_DELIVERY": "proven", "WORKER_SLOT": SLOT}
    async with project(shared, plain.TABLES, "tests.e2e.types_handlers", **settings) as made:
        listener = await made.listener()
        yield plain.Bench(made, listener, await made.worker())
        assert await made.db.fetchval("select count(*) from tailrace.gaps") == 0
        for process in made.processes:
            await process.kill()
            assert "Traceback" not in process.text
        slot = f"from pg_replication_slots where slot_name = '{SLOT}'"
        await made.until(f"select count(*) {slot} and active", 0)
        await made.db.execute(f"select pg_drop_replication_slot(slot_name) {slot}")


async def test_nulls_extremes_and_infinite_moments(bench: plain.Bench) -> None:
    await plain.test_nulls_extremes_and_infinite_moments(bench)


async def test_ordinary_values_of_every_type(bench: plain.Bench) -> None:
    # json keeps in the log what jsonb does not: the order of its keys.
    values = {name: value for name, value in plain.ORDINARY.items() if name != "document"}
    for key, table in enumerate(("kinds", "kinds_full"), 50):
        await bench.write(plain.insert(table, key, values))
        seen = await bench.change()
        plain.same(seen.record, await bench.row(table, key))
        assert (seen.repaired, seen.missing) == (set(), set())
        await bench.write(f"delete from {table} where id = {key}")
        assert (await bench.change()).key == f"({key},)"


async def test_not_a_number_and_infinity_need_no_second_look(bench: plain.Bench) -> None:
    await bench.write(
        plain.insert("kinds", 60, {"free": "'NaN'", "double": "'-Infinity'", "short": "'Infinity'"})
    )
    seen = await bench.change()
    plain.same(seen.record, await bench.row("kinds", 60))
    assert seen.repaired == set()
