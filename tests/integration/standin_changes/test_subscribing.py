"""Who gets a change: names, events, filters, row security, refusals."""

import asyncio
import json
from typing import Any

import pytest

from standin.changes import BadSubscription, Binding, binding_id

ANON = {"role": "anon"}
HEAD = "Unable to subscribe to changes with given parameters. "
CHECK = HEAD + "An exception happened so please check your connect parameters: "
ENABLED = HEAD + "Please check Realtime is enabled for the given connect parameters: "


@pytest.fixture
async def flt(db: Any) -> None:
    await db.execute(
        "create table flt (id int primary key, k int, name text, b boolean, j json, ts timestamptz)"
    )
    await db.execute("alter publication supabase_realtime add table flt")


@pytest.mark.parametrize(
    ("filter_text", "ids"),
    [
        ("k=eq.5", [1]),
        ("k=neq.5", [2, 4]),
        ("k=lt.5", [2]),
        ("k=lte.5", [1, 2]),
        ("k=gt.5", [4]),
        ("k=gte.5", [1, 4]),
        ("k=in.(1,9)", [2, 4]),
        ("k=not.in.(1,9)", [1]),
        ('name=eq."a,b"', [2]),
        ('name=in.(x,"a,b")', [2]),
        ("name=like.ab%", [1]),
        ("name=ilike.AB%", [1]),
        ("name=match.^a.*c$", [1]),
        ("name=imatch.^A", [1, 2]),
        ("name=is.null", [3]),
        ("name=not.is.null", [1, 2, 4]),
        ("b=is.true", [1]),
        ("b=eq.false", [2]),
        ("k=isdistinct.5", [2, 3, 4]),
        ("k=not.eq.5", [2, 4]),
        ("k=gt.1,k=lt.9", [1]),
        ("ts=gt.2024-01-01T00:00:00Z", [1]),
        ("", [1, 2, 3, 4]),
        (" ", [1, 2, 3, 4]),
    ],
)
@pytest.mark.usefixtures("flt")
async def test_filters(watch: Any, db: Any, filter_text: str, ids: list[int]) -> None:
    await watch.subscribe("s", "flt", filter=filter_text)
    await db.execute(
        "insert into flt values (1, 5, 'abc', true, null, '2024-06-01'),"
        "(2, 1, 'a,b', false, null, '2023-06-01'),"
        "(3, null, null, null, null, null), (4, 9, 'z', null, null, null)"
    )
    assert [frame["record"]["id"] for frame in await watch.frames("s")] == ids


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            Binding("*", "public", "flt", "k=foo.5", None),
            'Error parsing `filter` params: ["foo", "5"]',
        ),
        (Binding("*", "public", "flt", "name=eq.a,b", None), 'Error parsing `filter` params: ["b"]'),
        (
            Binding("*", "public", "flt", "nope=eq.1", None),
            CHECK
            + '[event: *, schema: public, table: flt, filters: [{"nope", "eq", "1", false}], select: nil]. '
            "Exception: ERROR P0001 (raise_exception) invalid column for filter nope",
        ),
        (
            Binding("*", "public", "flt", "k=eq.abc", None),
            CHECK + '[event: *, schema: public, table: flt, filters: [{"k", "eq", "abc", false}], '
            "select: nil]. "
            "Exception: ERROR 22P02 (invalid_text_representation) "
            'invalid input syntax for type integer: "abc"',
        ),
        (
            Binding("*", "public", "flt", "name=match.(", None),
            CHECK + '[event: *, schema: public, table: flt, filters: [{"name", "match", "(", false}], '
            "select: nil]. "
            "Exception: ERROR P0001 (raise_exception) invalid regular expression for match filter: "
            "invalid regular expression: parentheses () not balanced",
        ),
        (
            Binding("INSERT", "public", "flt", None, ("nope",)),
            CHECK + '[event: INSERT, schema: public, table: flt, filters: [], select: ["nope"]]. '
            "Exception: ERROR P0001 (raise_exception) invalid column for select nope",
        ),
        (
            Binding("*", "auth", None, None, None),
            ENABLED + "[event: *, schema: auth, table: *, filters: [], select: nil]",
        ),
        (
            Binding("*", "public", "f%t2", None, None),
            ENABLED + "[event: *, schema: public, table: f%t2, filters: [], select: nil]",
        ),
    ],
)
@pytest.mark.usefixtures("flt")
async def test_refusals(watch: Any, binding: Binding, message: str) -> None:
    with pytest.raises(BadSubscription) as refusal:
        await watch.feed.subscribe("s", [Binding("*", "public", "flt", None, None), binding], ANON)
    assert str(refusal.value) == message


@pytest.mark.usefixtures("flt")
async def test_refused_subscription_is_no_subscription(watch: Any, db: Any) -> None:
    good, bad = Binding("*", "public", "flt", None, None), Binding("*", "public", "gone", None, None)
    with pytest.raises(BadSubscription):
        await watch.feed.subscribe("s", [good, bad], ANON)
    await db.execute("insert into flt (id) values (1)")
    assert await watch.texts("s") == []


@pytest.mark.usefixtures("flt")
async def test_unknown_role_is_refused_by_postgres(watch: Any) -> None:
    with pytest.raises(
        BadSubscription, match=r'ERROR 42704 \(undefined_object\) role "nobody_here" does not exist'
    ):
        await watch.subscribe("s", "flt", claims={"role": "nobody_here"})


async def test_names_match_as_like_patterns_and_case_counts(watch: Any, db: Any) -> None:
    await db.execute(
        'create schema "My Schema"; create table "My Schema"."Odd.Name, t" (id int primary key);'
        "create table user_events (id int primary key); create table userxevents (id int primary key);"
        'create table "USER_EVENTS" (id int primary key);'
        "alter publication supabase_realtime add table user_events, userxevents,"
        '"USER_EVENTS", "My Schema"."Odd.Name, t"'
    )
    await watch.subscribe("pattern", "user_events")
    await watch.subscribe("odd", "Odd.Name, t", schema="My Schema")
    await watch.subscribe("star", None, schema="*")
    await db.execute(
        "insert into user_events values (1); insert into userxevents values (1);"
        'insert into "USER_EVENTS" values (1); insert into "My Schema"."Odd.Name, t" values (1)'
    )
    frames = await watch.frames("pattern")
    assert [frame["table"] for frame in frames] == ["user_events", "userxevents"]
    (odd,) = await watch.frames("odd")
    assert (odd["schema"], odd["table"]) == ("My Schema", "Odd.Name, t")
    assert len([f for f in await watch.frames("star") if f["table"] != "marker"]) == 4


async def test_partitions_are_told_by_their_own_names(watch: Any, db: Any) -> None:
    await db.execute(
        "create table part (id int, d int, primary key (id, d)) partition by range (d);"
        "create table part_1 partition of part for values from (0) to (10);"
        "create table part_2 partition of part for values from (10) to (20);"
        "alter publication supabase_realtime add table part"
    )
    with pytest.raises(BadSubscription):
        await watch.subscribe("s", "part")
    await watch.subscribe("s", "part_%")
    await db.execute("insert into part values (1, 5)")
    await db.execute("update part set d = 15")
    frames = await watch.frames("s")
    assert [(f["table"], f["type"]) for f in frames] == [
        ("part_1", "INSERT"),
        ("part_1", "DELETE"),
        ("part_2", "INSERT"),
    ]


@pytest.mark.usefixtures("flt")
async def test_two_bindings_make_one_frame_with_ids_in_reverse_order(watch: Any, db: Any) -> None:
    bindings = [Binding("INSERT", "public", "flt", None, None), Binding("*", "public", "flt", None, None)]
    await watch.feed.subscribe("s", bindings, ANON)
    await db.execute("insert into flt (id) values (1); delete from flt")
    await watch.settled()
    first, second = (binding_id(binding) for binding in bindings)
    assert [d.ids for d in watch.raw if d.subscriber == "s"] == [(second, first), (second,)]


@pytest.mark.usefixtures("flt")
async def test_delete_passes_a_filter_only_on_identity_columns(watch: Any, db: Any) -> None:
    await watch.subscribe("key", "flt", filter="id=eq.1")
    await watch.subscribe("other", "flt", filter="k=not.eq.5", event="DELETE")
    await db.execute("insert into flt (id, k) values (1, 1), (2, 1); delete from flt")
    assert [b[0] for b in await watch.brief("key")] == ["INSERT", "DELETE"]
    assert await watch.brief("other") == []
    await db.execute("alter table flt replica identity full")
    await db.execute("insert into flt (id, k) values (3, 1); delete from flt")
    assert [b[0] for b in await watch.brief("other")] == ["DELETE"]


async def test_row_security_judges_the_row_as_it_is_now_with_the_claims(watch: Any, db: Any) -> None:
    await db.execute(
        "create table own (id int primary key, owner text); alter table own enable row level security;"
        "create policy own on own for select to authenticated using (owner = auth.jwt() ->> 'sub');"
        "alter publication supabase_realtime add table own; alter table own replica identity full"
    )
    await watch.subscribe("alice", "own", claims={"role": "authenticated", "sub": "alice"})
    await watch.subscribe("anon", "own", claims=ANON)
    await watch.subscribe("service", "own")
    await db.execute("insert into own values (1, 'alice'), (2, 'bob')")
    await watch.settled()
    await db.execute("begin; insert into own values (3, 'alice'); delete from own where id = 3; commit")
    await watch.settled()
    await db.execute("delete from own")
    deletes = [("DELETE", None, {"id": number}) for number in (3, 1, 2)]
    assert await watch.brief("alice") == [("INSERT", {"id": 1, "owner": "alice"}, None), *deletes]
    assert await watch.brief("anon") == deletes
    assert [b[0] for b in await watch.brief("service")] == ["INSERT", "INSERT", "DELETE", "DELETE", "DELETE"]


@pytest.mark.usefixtures("flt")
async def test_what_cannot_be_judged_is_withheld_from_its_subscriber_alone(watch: Any, db: Any) -> None:
    await db.execute(
        "create table prls (id int primary key, d int); alter table prls enable row level security;"
        "create policy p on prls for select to anon using (1 / d > 0);"
        "alter publication supabase_realtime add table prls"
    )
    await watch.subscribe("json", "flt", filter="j=eq.{}")
    await watch.subscribe("anon", "prls", claims=ANON)
    await watch.subscribe("innocent", "flt")
    await db.execute("insert into flt (id, j) values (1, '{}'), (2, '[]')")
    await db.execute("insert into prls values (1, 0), (2, 1)")
    assert await watch.texts("json") == []
    assert [b[1] for b in await watch.brief("anon")] == [{"id": 2, "d": 1}]
    assert len(await watch.texts("innocent")) == 2


@pytest.mark.usefixtures("flt")
async def test_unsubscribed_and_replaced_subscriptions_get_nothing(watch: Any, db: Any) -> None:
    await watch.subscribe("gone", "flt")
    await watch.subscribe("moved", "flt")
    await watch.feed.unsubscribe("gone")
    await watch.subscribe("moved", "flt", event="DELETE")
    await db.execute("insert into flt (id) values (1)")
    assert await watch.texts("gone") == []
    assert await watch.texts("moved") == []


async def test_publication_change_renews_subscriptions_and_tells(watching_with: Any, db: Any) -> None:
    await db.execute(
        "create table a (id int primary key); create table b (id int primary key);"
        "alter publication supabase_realtime add table a"
    )
    async with watching_with(publication_check_interval=0.01) as watch, asyncio.timeout(30):
        await watch.subscribe("wide", None)
        await watch.subscribe("narrow", "a")
        await db.execute("alter publication supabase_realtime add table b")
        renewed = {await watch.resubscribed.get(), await watch.resubscribed.get()}
        assert renewed == {"wide", "narrow"}
        await db.execute("insert into b values (1)")
        assert json.loads((await watch.texts("wide"))[0])["table"] == "b"
        await db.execute("alter publication supabase_realtime drop table a")
        subscriber, refusal = await watch.refused.get()
        assert (subscriber, str(refusal).startswith(ENABLED)) == ("narrow", True)
