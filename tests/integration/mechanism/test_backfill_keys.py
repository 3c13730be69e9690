"""A backfill's keys are those of live changes, whatever the type: one value is one key."""

import json
from collections.abc import Sequence

import pytest
from sqlalchemy import column, select, table
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench
from worker import Handlers
from worker.backfill import Backfills
from worker.catalogue import read_catalogue
from worker.kept_keys import PAGE
from worker.registry import Handler
from worker.values import canonicalizer

TABLES = """
create type pairing as (number int, word text, at timestamptz);
create domain even as int check (mod(value, 2) = 0);
create table places (
  id int primary key, pair pairing, span int4range, pair_list pairing[], even even
);
create table derived_places (place %(type)s);
set datestyle = 'german';
insert into places values (
  1, row (7, 'a "b"', '2026-01-02 03:04+00'), '[1,5)', array[row (1, null, null)::pairing], 4
);
insert into derived_places select %(name)s from places;
"""


async def backfilled(at: Bench, on: Handlers) -> list[bytes]:
    """Backfill the table for the handler `one`; returns the lane keys that it was given."""
    async with at.engine.connect() as connection:
        catalogue = await read_catalogue(connection, "supabase_realtime", [("public", "places")])
    given: list[bytes] = []

    async def put(handler: Handler, keys: Sequence[bytes]) -> None:
        given.extend(keys)

    async def until_passed(handler: Handler) -> None:
        """Everything is applied at once here."""

    await at.db.execute(
        "insert into tailrace.handlers (name, kind, tables) values ('one', 'derive', '{public.places}');"
        "insert into tailrace.backfills (handler, schema_name, table_name) values ('one', 'public', 'places')"
    )
    assert await Backfills(at.engine, on.handlers(), catalogue, put, until_passed, form="text").once()
    return given


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pair", "pairing"),
        ("span", "int4range"),
        ("pair_list", "pairing[]"),
        ("even", "even"),
    ],
)
async def test_rows_and_kept_keys_have_the_keys_of_the_log(at: Bench, name: str, kind: str) -> None:
    await at.db.execute(TABLES % {"name": name, "type": kind})
    on = Handlers()
    kept = select(column("place")).select_from(table("derived_places"))

    @on.derive("places", by=name, name="one", all_keys=kept)
    async def one(keys: list[object], session: AsyncSession) -> None:
        """Nothing is computed here."""

    async with at.engine.connect() as connection:
        catalogue = await read_catalogue(connection, "supabase_realtime", [("public", "places")])
    value_type = catalogue.tables["public", "places"].columns[name].value_type
    await at.db.execute("set datestyle = 'ISO, MDY'; set timezone = 'UTC'")
    printed = await at.db.fetchval(f"select format('%s', {name}) from places")
    wanted = canonicalizer(value_type, "text")(printed.encode())
    given = await backfilled(at, on)
    assert len(given) == 2
    assert len(set(given)) == 1
    assert json.loads(given[0]) == [wanted]


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        # As texts they stand in another order: 10 before 9, -1 before -2, a before B.
        ("bigint", "n * 7 - 9000"),
        ("numeric", "n / 3.0"),
        ("timestamptz", "timestamptz '2000-01-01' + n * interval '1 week'"),
        ("text", "case n % 2 when 0 then 'a' else 'B' end || n"),
    ],
)
async def test_no_row_is_left_out_whatever_the_order_of_the_keys_as_texts(
    at: Bench, kind: str, made: str
) -> None:
    rows = 3 * PAGE + 1
    await at.db.execute(f"create table places (id {kind} primary key)")
    await at.db.execute(f"insert into places select {made} from generate_series(1, {rows}) n")
    on = Handlers()

    @on.derive("places", by="id", name="one")
    async def one(keys: list[object], session: AsyncSession) -> None:
        """Nothing is computed here."""

    given = await backfilled(at, on)
    assert (len(given), len(set(given))) == (rows, rows)
    assert await at.db.fetchval("select rows from tailrace.backfills") == rows
