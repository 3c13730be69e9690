"""What a frame holds: identity, TOAST, keys, privileges, size."""

import json
from typing import Any

import asyncpg
import pytest

ANON = {"role": "anon"}


async def publish(db: asyncpg.Connection, definition: str) -> None:
    await db.execute(f"create table {definition}")
    await db.execute(f"alter publication supabase_realtime add table {definition.partition('(')[0]}")


async def test_frame_has_the_keys_of_the_real_server_in_their_order(watch: Any, db: Any) -> None:
    await publish(db, "t (id int primary key, v text)")
    await watch.subscribe("s", "t")
    await db.execute("insert into t values (1, 'one'); update t set v = 'two'; delete from t")
    inserted, updated, deleted = await watch.texts("s")
    columns = '[{"name": "id", "type": "int4"}, {"name": "v", "type": "text"}]'
    stamp = json.loads(inserted)["commit_timestamp"]
    assert inserted == (
        '{"table":"t","type":"INSERT","record":{"v": "one", "id": 1},"columns":' + columns + ',"errors":null,'
        '"schema":"public","commit_timestamp":"' + stamp + '"}'
    )
    assert updated == (
        '{"table":"t","type":"UPDATE","record":{"v": "two", "id": 1},"columns":' + columns + ',"errors":null,'
        '"schema":"public","commit_timestamp":"' + stamp + '","old_record":{"id": 1}}'
    )
    assert deleted == (
        '{"table":"t","type":"DELETE","columns":' + columns + ',"errors":null,"schema":"public",'
        '"commit_timestamp":"' + stamp + '","old_record":{"id": 1}}'
    )


@pytest.mark.parametrize(
    ("identity", "old_of_update", "old_of_key_change", "old_of_delete"),
    [
        ("default", {"id": 1}, {"id": 1}, {"id": 2}),
        ("full", {"id": 1, "k": 5, "v": "a"}, {"id": 1, "k": 5, "v": "b"}, {"id": 2, "k": 5, "v": "b"}),
        ("using index t_k_key", {"k": 5}, {"k": 5}, {"k": 5}),
    ],
)
async def test_old_record_follows_replica_identity(
    watch: Any, db: Any, identity: str, old_of_update: Any, old_of_key_change: Any, old_of_delete: Any
) -> None:
    await publish(db, "t (id int primary key, k int not null unique, v text)")
    await db.execute(f"alter table t replica identity {identity}")
    await watch.subscribe("s", "t")
    for statement in (
        "insert into t values (1, 5, 'a')",
        "update t set v = 'b'",
        "update t set id = 2",
        "delete from t",
    ):
        await db.execute(statement)
    assert await watch.brief("s") == [
        ("INSERT", {"id": 1, "k": 5, "v": "a"}, None),
        ("UPDATE", {"id": 1, "k": 5, "v": "b"}, old_of_update),
        ("UPDATE", {"id": 2, "k": 5, "v": "b"}, old_of_key_change),
        ("DELETE", None, old_of_delete),
    ]


@pytest.mark.parametrize("identity", ["default", "full"])
async def test_untouched_toast_is_absent_unless_identity_is_full(watch: Any, db: Any, identity: str) -> None:
    await publish(db, "t (id int primary key, v text, big text)")
    await db.execute(
        f"alter table t alter big set storage external; alter table t replica identity {identity}"
    )
    await watch.subscribe("s", "t")
    await db.execute("insert into t values (1, 'a', repeat('x', 60000))")
    await db.execute("update t set v = 'b'")
    _, update = await watch.frames("s")
    record = {"id": 1, "v": "b"} | ({"big": "x" * 60000} if identity == "full" else {})
    assert update["record"] == record
    assert [column["name"] for column in update["columns"]] == ["id", "v", "big"]


async def test_table_without_key_gives_400_except_for_deletes(watch: Any, db: Any) -> None:
    await publish(db, "t (a int, v text)")
    await db.execute("alter table t replica identity full")
    await watch.subscribe("s", "t", filter="a=eq.9")
    await watch.subscribe("all", "t")
    await db.execute("insert into t values (1, 'v')")
    await db.execute("update t set v = 'w'")
    await db.execute("delete from t")
    texts = await watch.texts("all")
    refused = (
        '"columns":[],"errors":["Error 400: Bad Request, no primary key"],'
        '"schema":"public","commit_timestamp":null'
    )
    assert texts[0] == '{"table":"t","type":"INSERT","record":{},' + refused + "}"
    assert texts[1] == '{"table":"t","type":"UPDATE","record":{},' + refused + ',"old_record":{}}'
    assert json.loads(texts[2])["old_record"] == {"a": 1, "v": "w"}
    assert await watch.texts("s") == texts[:2]


async def test_privileges_cut_columns_and_the_key_gives_401(watch: Any, db: Any) -> None:
    await publish(db, "t (id int primary key, v text, secret text)")
    await db.execute("alter table t replica identity full")
    await watch.subscribe("anon", "t", claims=ANON)
    await db.execute("revoke all on t from anon; grant select (id, v) on t to anon")
    await db.execute("insert into t values (1, 'v', 's')")
    await watch.settled()
    await db.execute("revoke select (id, v) on t from anon")
    await db.execute("update t set v = 'w'")
    await db.execute("delete from t")
    cut, refused, deleted = await watch.frames("anon")
    assert (cut["record"], [c["name"] for c in cut["columns"]]) == ({"id": 1, "v": "v"}, ["id", "v"])
    assert (refused["record"], refused["old_record"], refused["columns"]) == ({}, {}, [])
    assert (refused["errors"], refused["commit_timestamp"]) == (["Error 401: Unauthorized"], None)
    assert (deleted["old_record"], deleted["columns"], deleted["errors"]) == ({}, [], None)


async def test_select_keeps_the_key_and_makes_a_frame_of_its_own(watch: Any, db: Any) -> None:
    await publish(db, "t (id int primary key, a text, b text)")
    await watch.subscribe("s", "t", select=("b",))
    await db.execute("insert into t values (1, 'a', 'b')")
    (frame,) = await watch.frames("s")
    assert frame["record"] == {"id": 1, "b": "b"}
    assert [column["name"] for column in frame["columns"]] == ["id", "b"]


async def test_row_above_the_limit_keeps_small_values_only(watch: Any, db: Any) -> None:
    await publish(db, "t (id int primary key, s64 text, s65 text, n text, j jsonb, body text)")
    await db.execute("alter table t replica identity full")
    await watch.subscribe("s", "t", filter="id=eq.1")
    await db.execute(
        "insert into t values (1, repeat('a', 62), repeat('b', 63), null, 'null', repeat('x', 1200000))"
    )
    await db.execute("delete from t")
    inserted, deleted = await watch.frames("s")
    kept = {"id": 1, "s64": "a" * 62, "j": None}
    assert (inserted["record"], inserted["errors"]) == (kept, ["Error 413: Payload Too Large"])
    assert (deleted["old_record"], deleted["errors"]) == (kept, ["Error 413: Payload Too Large"])


async def test_limit_is_of_the_log_and_counts_escapes(watch: Any, db: Any) -> None:
    await publish(db, "t (id int primary key, body text)")
    await watch.subscribe("s", "t")
    for body in (
        "repeat('x', 1040000)",
        "repeat(chr(1), 170000)",
        "repeat(chr(1), 180000)",
        "repeat('é', 530000)",
    ):
        await db.execute(f"insert into t select coalesce(max(id), 0) + 1, {body} from t")
    assert [frame["errors"] is None for frame in await watch.frames("s")] == [True, True, False, False]


async def test_values_have_the_rendering_of_the_real_server(watch: Any, db: Any) -> None:
    await db.execute("create type mood as enum ('sad', 'very happy'); create type pair as (a int, b text)")
    values = {
        "c5 char(5)": ("'ab'", '"a"'),
        "bits bit(4)": ("B'1010'", '"1"'),
        "varbits varbit": ("B'101'", '"101"'),
        "bin bytea": (r"'\xdeadbeef00'", '"deadbeef00"'),
        "o oid": ("4294967295", '"4294967295"'),
        "n numeric": ("0.1000", "0.1000"),
        "nan numeric": ("'NaN'", "null"),
        "inf double precision": ("'-Infinity'", "null"),
        "zero double precision": ("'-0'", "0"),
        "big double precision": ("1e20", "100000000000000000000"),
        "nans float8[]": ("'{NaN,1}'", '["NaN", 1]'),
        "js json": ("""'{"b": 1,  "a": [1.50], "b": 2}'""", '{"a": [1.50], "b": 2}'),
        "at timestamptz": ("'2024-02-29 13:14:15.1+05:30'", '"2024-02-29T07:44:15.1+00:00"'),
        "never timestamptz": ("'-infinity'", '"-infinity"'),
        "past timestamp": ("'0044-03-15 12:00:00 BC'", '"0044-03-15T12:00:00 BC"'),
        "for_ interval": ("'1 year 3 days 04:05'", '"1 year 3 days 04:05:00"'),
        "moods mood[]": ("'{sad,\"very happy\"}'", '["sad", "very happy"]'),
        "p pair": ("row(1, 'two')", '{"a": 1, "b": "two"}'),
        "r tstzrange": ("'[2024-01-01 00:00+00,)'", r'"[\"2024-01-01 00:00:00+00\",)"'),
        "m money": ("'$1,234.56'", '"$1,234.56"'),
        "tx text": ("E'\"q\"\\t\\x01é\\u2028'", '"\\"q\\"\\t\\u0001é\u2028"'),
    }
    await publish(
        db, f"t (id int primary key, {', '.join(values)}, gen int generated always as (id * 2) stored)"
    )
    await watch.subscribe("s", "t")
    await db.execute(
        "set timezone = 'America/New_York'; set extra_float_digits = -10; set bytea_output = escape"
    )
    await db.execute(f"insert into t values (1, {', '.join(value for value, _ in values.values())})")
    (text,) = await watch.texts("s")
    wrong = [
        name for name, (_, json_text) in values.items() if f'"{name.split()[0]}": {json_text}' not in text
    ]
    assert not wrong, text
    assert '"gen": 2' in text
