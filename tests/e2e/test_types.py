"""Values of every type through the real processes: a handler gets what asyncpg reads of the same row."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import asyncpg
import pytest

from tests.e2e.types_handlers import TABLES, told
from tests.stack import Process, Project, Servers, project

Told = dict[str, list[str]]
CUT = {"padded", "bits"}
"""Realtime sends only the first character of these."""


class Seen(NamedTuple):
    """A change as the handler saw it."""

    type: str
    key: str
    record: Told | None
    old_record: Told | None
    repaired: set[str]
    missing: set[str]
    unchanged: set[str]
    reasons: dict[str, str]
    old_reasons: dict[str, str]


@dataclass
class Bench:
    """A project whose processes run, and how many changes have been seen."""

    project: Project
    listener: Process
    worker: Process
    passed: int = 0

    async def write(self, statement: str, *values: object) -> None:
        await self.project.db.execute(statement, *values)

    async def changes(self, number: int = 1) -> list[Seen]:
        """Wait for the next changes: what is repaired is as of now, so nothing may be written before."""
        await self.project.until("select count(*) from derived_seen", self.passed + number)
        rows = await self.project.db.fetch(
            "select * from derived_seen order by seq offset $1 limit $2", self.passed, number
        )
        self.passed += number
        return [
            Seen(
                row["type"],
                row["key"],
                json.loads(row["record"] or "null"),
                json.loads(row["old_record"] or "null"),
                set(row["repaired"]),
                set(row["missing"]),
                set(row["unchanged"]),
                json.loads(row["reasons"]),
                json.loads(row["old_reasons"]),
            )
            for row in rows
        ]

    async def change(self) -> Seen:
        (seen,) = await self.changes()
        return seen

    async def columns(self, table: str) -> dict[str, str]:
        rows = await self.project.db.fetch(
            "select a.attname, t.typname from pg_attribute a join pg_type t on t.oid = a.atttypid"
            " where a.attrelid = $1::text::regclass and a.attnum > 0 order by a.attnum",
            table,
        )
        return dict(rows)

    async def row(self, table: str, key: int) -> Told:
        """What asyncpg reads of a row."""
        found = {}
        for name, kind in (await self.columns(table)).items():
            found[name] = told(await self._value(table, name, kind, key))
        return found

    async def _value(self, table: str, name: str, kind: str, key: int) -> Any:
        # Of json Realtime sends what jsonb keeps of it.
        column = f'"{name}"' + ("::jsonb" if kind == "json" else "")
        try:
            value = await self.project.db.fetchval(f"select {column} from {table} where id = $1", key)
        except (ValueError, OverflowError):
            # What Python cannot hold is Postgres's text.
            return await self.project.db.fetchval(f'select "{name}"::text from {table} where id = $1', key)
        return json.loads(value) if kind in ("json", "jsonb") and value is not None else value


@pytest.fixture(scope="module")
async def bench(shared: Servers) -> AsyncIterator[Bench]:
    async with project(shared, TABLES, "tests.e2e.types_handlers") as made:
        listener = await made.listener()
        yield Bench(made, listener, await made.worker())
        gaps = await made.db.fetch("select cause from tailrace.gaps")
        assert not gaps
        for process in made.processes:
            assert "Traceback" not in process.text
            assert "secret of a row" not in process.text


ORDINARY = {
    "small": "-32768",
    "whole": "-7",
    "big": "9223372036854775807",
    "exact": "1234567890123456789012.12345678",
    "free": "0.5000",
    "short": "2.7182817",
    "double": "0.3",
    "words": "E'secret of a row: üé 漢 😀 \"double\" ''single'' \\\\ back\\nnew line\\ttab\\x01ctl\\u2028'",
    "bounded": "'éé'",
    "padded": "'xyz'",
    "flag": "true",
    "day": "'2028-02-29'",
    "clock": "'23:59:59.999999'",
    "clock_zone": "'06:30:00.5-07:15'",
    "moment": "'1999-12-31 23:59:59.000001'",
    "moment_zone": "'2030-07-01 12:00:00.25+09:30'",
    "second_zone": "'2030-07-01 12:00:00+00'",
    "span": "'-3 years 5 mons -9 days 11:12:13.000014'",
    "code": "'00000000-0000-4000-8000-0123456789ab'",
    "document": """'{"twice": 1, "list": [1.0, null, {"deep": true}], "twice": "second"}'""",
    "binary_document": """'{"n": 12.340, "large": 18446744073709551617, "exp": 1e30, "s": "\\u00e9"}'""",
    "bytes": r"'\x00ff10'",
    "numbers": "'{3,NULL,-1}'",
    "texts": """'{plain,"with space","quote\\"d",NULL,"NULL","a,b","{}",""}'""",
    "matrix": "'{{1,2,3},{4,5,6}}'",
    "feeling": "'so so'",
    "feelings": """'{high,"so so",NULL}'""",
    "even": "42",
    "pairing": "row(3, 'three, \"quoted\"')",
    "host": "'10.1.2.3/16'",
    "net": "'2001:db8::/32'",
    "mac": "'0a:1b:2c:3d:4e:5f'",
    "spot": "'(0.25,-1e20)'",
    "lexemes": "'cat:3 dog:1A,5'",
    "direction": "'[0.5,-2,3]'",
    "price": "'-$98,765.43'",
    "bits": "B'01101'",
    "some_bits": "B'1'",
    "whole_range": "'(3,9]'",
    "period": "'[2024-05-01 00:00+02,)'",
    "object": "4000000000",
    "label": "'a name'",
    '"Odd name"': "-1",
    "amounts": "'{1.10,NaN,NULL,-0.000}'",
    "lengths": "'{NaN,Infinity,-0.5,1e-300}'",
}
EXTREMES = [
    {"big": "-9223372036854775808", "free": "1e-30", "double": "-0.0", "short": "1e-45", "flag": "false"},
    {"free": "1e100", "double": "1.7976931348623157e308", "short": "3.4028235e38", "small": "32767"},
    {"document": "'null'", "binary_document": "'[]'", "words": "''", "bytes": "''", "numbers": "'{}'"},
    {"document": "'\"text\"'", "binary_document": "'\"text\"'", "padded": "''", "some_bits": "B''"},
    {"moment": "'infinity'", "moment_zone": "'-infinity'", "day": "'infinity'"},
    {"moment": "'0044-03-15 12:00 BC'", "moment_zone": "'12000-01-01 00:00+00'", "day": "'0001-01-01'"},
    {"clock": "'24:00'", "span": "'2000000 years'", "clock_zone": "'00:00+15:59'", "period": "'empty'"},
    {"price": "'92233720368547758.07'", "object": "0", "whole_range": "'(,)'", "host": "'::1'"},
    {"padded": "'é'", "bits": "B'00000'", "label": "''", "texts": "'{{a,b},{c,NULL}}'"},
]


def insert(table: str, key: int, values: dict[str, str]) -> str:
    names, literals = ", ".join(["id", *values]), ", ".join([str(key), *values.values()])
    return f"insert into {table} ({names}) values ({literals})"


def same(got: Told | None, want: Told) -> None:
    assert got is not None
    assert not {name: (got.get(name), pair) for name, pair in want.items() if got.get(name) != pair}
    assert set(got) == set(want)


async def test_every_type_is_inserted_updated_and_deleted_exactly(bench: Bench) -> None:
    await bench.write(insert("kinds", 1, ORDINARY))
    inserted = await bench.change()
    assert (inserted.type, inserted.key, inserted.old_record) == ("INSERT", "(1,)", None)
    same(inserted.record, await bench.row("kinds", 1))
    assert inserted.repaired == CUT
    assert not inserted.missing

    await bench.write("update kinds set whole = 2147483647 / 2, padded = 'other', flag = null where id = 1")
    updated = await bench.change()
    same(updated.record, await bench.row("kinds", 1))
    assert (updated.type, updated.repaired, updated.missing) == ("UPDATE", CUT, set())
    assert updated.old_record == {"id": ["int", "1", "1"]}

    await bench.write("update kinds set id = 1001 where id = 1")
    moved = await bench.change()
    same(moved.record, await bench.row("kinds", 1001))
    assert (moved.type, moved.key, moved.old_record) == ("UPDATE", "(1001,)", {"id": ["int", "1", "1"]})

    await bench.write("delete from kinds where id = 1001")
    deleted = await bench.change()
    assert (deleted.type, deleted.key, deleted.record) == ("DELETE", "(1001,)", None)
    assert deleted.old_record == {"id": ["int", "1001", "4"]}
    assert deleted.missing == set(await bench.columns("kinds")) - {"id"}
    assert "REPLICA IDENTITY FULL" in deleted.old_reasons["whole"]


async def test_full_replica_identity_carries_old_values_of_every_type(bench: Bench) -> None:
    await bench.write(insert("kinds_full", 1, ORDINARY))
    same((await bench.change()).record, before := await bench.row("kinds_full", 1))
    # Nobody can read again what char(n) and bit(n) were.
    known = {name: value for name, value in before.items() if name not in CUT}

    await bench.write(
        "update kinds_full set big = 1, exact = -0.1, words = 'w', bits = B'10000' where id = 1"
    )
    updated = await bench.change()
    same(updated.record, await bench.row("kinds_full", 1))
    same(updated.old_record, known)
    assert set(updated.old_reasons) == CUT
    assert (updated.repaired, updated.missing) == (CUT, set())

    known = {name: value for name, value in (await bench.row("kinds_full", 1)).items() if name not in CUT}
    await bench.write("delete from kinds_full where id = 1")
    deleted = await bench.change()
    same(deleted.old_record, known)
    assert (deleted.missing, deleted.key) == (CUT, "(1,)")


async def test_nulls_extremes_and_infinite_moments(bench: Bench) -> None:
    await bench.write("insert into kinds (id) values (10)")
    nothing = await bench.change()
    same(nothing.record, await bench.row("kinds", 10))
    assert {value[1] for name, value in (nothing.record or {}).items() if name != "id"} == {"None"}
    for key, values in enumerate(EXTREMES, 11):
        await bench.write(insert("kinds", key, values))
    for key, seen in enumerate(sorted(await bench.changes(len(EXTREMES)), key=lambda one: one.key), 11):
        same(seen.record, await bench.row("kinds", key))
        assert seen.key == f"({key},)"
        assert not seen.missing


@pytest.mark.parametrize("table", ["kinds", "kinds_full"])
async def test_not_a_number_and_infinity_are_read_again(bench: Bench, table: str) -> None:
    values = {"free": "'NaN'", "double": "'-Infinity'", "short": "'Infinity'"}
    await bench.write(insert(table, 30, values))
    seen = await bench.change()
    same(seen.record, await bench.row(table, 30))
    assert seen.repaired == {"free", "double", "short"}
    assert (seen.record or {})["free"] == ["Decimal", "NaN", "3"]
    await bench.write(f"update {table} set double = null, short = 1, free = 'Infinity' where id = 30")
    seen = await bench.change()
    same(seen.record, await bench.row(table, 30))
    # That the null of a column is NULL and not NaN is known only from the row.
    assert "free" in seen.repaired
    assert (seen.record or {})["double"] == ["NoneType", "None", "4"]


async def test_the_writers_session_changes_no_value(bench: Bench) -> None:
    odd = await asyncpg.connect(bench.project.database_url)
    try:
        await odd.execute(
            "set timezone = 'Asia/Kathmandu'; set datestyle = 'SQL, DMY'; set intervalstyle = 'sql_standard';"
            "set bytea_output = 'escape'; set extra_float_digits = -10; set standard_conforming_strings = on"
        )
        await odd.execute(insert("kinds", 40, ORDINARY))
    finally:
        await odd.close()
    same((await bench.change()).record, await bench.row("kinds", 40))


@pytest.mark.parametrize("table", ["papers", "papers_full"])
async def test_unchanged_toast_is_there(bench: Bench, table: str) -> None:
    body = "secret of a row " * 2_000
    await bench.write(
        f"insert into {table} values (1, 'a', $1, 'ab', B'101', 1.5, null)",
        body,
    )
    inserted = await bench.change()
    same(inserted.record, await bench.row(table, 1))
    await bench.write(f"update {table} set title = 'b' where id = 1")
    updated = await bench.change()
    same(updated.record, await bench.row(table, 1))
    assert not updated.missing
    if table == "papers_full":
        # With the old row Realtime has the value at hand, and sends it.
        assert (updated.unchanged, updated.repaired) == (set(), {"fixed", "mask"})
        assert updated.old_record is not None
        assert updated.old_record["body"] == told(body)
    else:
        assert (updated.unchanged, updated.repaired) == ({"body"}, {"body", "fixed", "mask"})
        assert updated.old_record == {"id": ["int", "1", "1"]}


@pytest.mark.parametrize("table", ["papers", "papers_full"])
async def test_rows_over_a_mebibyte_are_completed(bench: Bench, table: str) -> None:
    body = "m" * 1_500_000
    await bench.write(
        f"insert into {table} values (2, 'short', $1, 'cd', B'011', 'NaN', 'secret of a row')", body
    )
    seen = await bench.change()
    same(seen.record, await bench.row(table, 2))
    assert seen.repaired == {"body", "fixed", "mask", "weight"}
    assert not seen.missing
    await bench.write(f"update {table} set title = 'longer', body = body || 'x' where id = 2")
    seen = await bench.change()
    same(seen.record, await bench.row(table, 2))
    assert "body" in seen.repaired
    await bench.write(f"delete from {table} where id = 2")
    seen = await bench.change()
    assert (seen.type, seen.key) == ("DELETE", "(2,)")
    if table == "papers_full":
        assert seen.missing == {"body", "fixed", "mask", "weight"}
        assert "413" in seen.old_reasons["body"]


async def test_what_is_gone_is_missing_and_says_why(bench: Bench) -> None:
    # While no worker works, the row is deleted: its values cannot be read again.
    assert await bench.worker.terminate() == 0
    await bench.write(f"insert into papers values (3, 't', '{'b' * 9000}', 'ef', B'111', 'NaN', null)")
    await bench.write("update papers set title = 'u' where id = 3")
    await bench.write("delete from papers where id = 3")
    bench.worker = await bench.project.worker()
    inserted, updated, deleted = await bench.changes(3)
    assert (inserted.type, updated.type, deleted.type) == ("INSERT", "UPDATE", "DELETE")
    # A null that may be NULL or NaN is a value nobody knows; the text came whole.
    assert inserted.missing >= {"fixed", "mask"}
    assert (inserted.record or {})["title"] == told("t")
    assert "body" in (inserted.record or {})
    assert updated.missing >= {"body", "fixed", "mask"}
    assert updated.missing.isdisjoint(updated.record or {})
    assert updated.missing == set(updated.reasons)
    assert "the row is gone" in updated.reasons["body"]
    assert not inserted.repaired
    assert deleted.key == "(3,)"
