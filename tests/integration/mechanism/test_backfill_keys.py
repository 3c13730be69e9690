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
    given: list[bytes] = []

    async def put(handler: Handler, keys: Sequence[bytes]) -> None:
        given.extend(keys)

    async def until_passed(handler: Handler) -> None:
        """Everything is applied at once here."""

    handlers = on.handlers()
    await at.db.execute(
        "insert into tailrace.handlers (name, kind, tables) values ('one', 'derive', '{public.places}');"
        "insert into tailrace.backfills (handler, schema_name, table_name) values ('one', 'public', 'places')"
    )
    backfills = Backfills(at.engine, handlers, catalogue, put, until_passed, form="text")
    assert await backfills.once()
    assert len(given) == 2
    assert len(set(given)) == 1
    assert json.loads(given[0]) == [wanted]
