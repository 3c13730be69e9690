"""Break it, see the finding, mend it, see it gone: by `--fix` where that is safe, else by the remedy."""

import asyncio
import json
import re
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from tests.integration.check.patients import INSERTS, ROOT, Patients
from worker.check.findings import Finding


class Illness(NamedTuple):
    made_by: tuple[str, ...]
    name: str
    says: str
    steps: tuple[str, ...] = ()
    """What `--fix` runs."""


SAFE = {
    "a table outside the publication": Illness(
        ("alter publication supabase_realtime drop table public.orders",),
        "tables",
        "public.orders is not in publication supabase_realtime",
        ("alter publication supabase_realtime add table public.orders;",),
    ),
    "the canary outside the publication": Illness(
        ("alter publication supabase_realtime drop table tailrace.canary",),
        "publication",
        "tailrace.canary is not in the publication",
        ('alter publication "supabase_realtime" add table tailrace.canary;',),
    ),
    "a publication without deletes": Illness(
        ("alter publication supabase_realtime set (publish = 'insert, update')",),
        "publication",
        "does not publish inserts, updates and deletes alike",
        ("alter publication \"supabase_realtime\" set (publish = 'insert, update, delete, truncate');",),
    ),
    "old values that are not carried": Illness(
        ("alter table public.orders replica identity default",),
        "tables",
        "by= needs old values of customer_id",
        ("alter table public.orders replica identity full;",),
    ),
    "a table that is granted to nobody": Illness(
        ("revoke select on public.orders from service_role",),
        "grants",
        "service_role may not select from public.orders",
        (
            'grant usage on schema "public" to "service_role";',
            'grant select on "public"."orders" to "service_role";',
        ),
    ),
    "migrations that are missing": Illness(
        ("drop schema tailrace cascade",),
        "migrations",
        "Tailrace's tables are missing",
        ("python -m worker migrate",),
    ),
}


@pytest.mark.parametrize("illness", SAFE.values(), ids=SAFE.keys())
async def test_what_is_safe_is_mended(healthy: Patients, illness: Illness) -> None:
    await healthy.sql(*illness.made_by)
    found = [one for one in await healthy.wrong() if one.name == illness.name]
    assert any(illness.says in one.detail for one in found), found
    done = await healthy.mended(found)
    assert [(one.words, one.error) for one in done] == [(words, "") for words in illness.steps]
    assert await healthy.wrong() == []


BY_HAND = {
    "no primary key, but what could be one": Illness(
        ("alter table public.orders drop constraint orders_pkey",),
        "tables",
        "public.orders has no primary key",
    ),
    "an unlogged table": Illness(
        (
            "alter publication supabase_realtime drop table public.orders",
            "alter table public.orders set unlogged",
        ),
        "tables",
        "public.orders is unlogged",
    ),
    "a publication that leaves out rows": Illness(
        (
            "alter publication supabase_realtime drop table public.orders",
            "alter publication supabase_realtime add table public.orders where (id > 5)",
        ),
        "publication",
        "leaves out rows of public.orders",
    ),
    "a publication that leaves out columns": Illness(
        (
            "alter publication supabase_realtime drop table public.orders",
            "alter publication supabase_realtime add table public.orders (id, customer_id)",
        ),
        "publication",
        "leaves out columns of public.orders",
    ),
}


@pytest.mark.parametrize("illness", BY_HAND.values(), ids=BY_HAND.keys())
async def test_what_a_person_has_to_decide_is_mended_by_the_remedy(
    healthy: Patients, illness: Illness
) -> None:
    await healthy.sql(*illness.made_by)
    found = [one for one in await healthy.wrong() if one.name == illness.name and illness.says in one.detail]
    assert found
    assert not any(one.fixes for one in found)
    await healthy.sql(*dict.fromkeys(statement(one) for one in found))
    await healthy.mended(await healthy.wrong())  # an unlogged table is in no publication
    assert await healthy.wrong() == []


def statement(finding: Finding) -> str:
    """What a remedy offers first."""
    offered = re.match(r"(.*?;)(?: \(| or,|$)", finding.remedy.partition(": ")[2])
    assert offered, finding.remedy
    return offered[1]


async def test_a_table_without_anything_that_could_be_a_key(healthy: Patients) -> None:
    await healthy.sql(
        "alter table public.orders drop constraint orders_pkey, drop constraint orders_number_key"
    )
    found, _ = [one for one in await healthy.wrong() if "has no primary key" in one.detail]
    assert "add primary key (…)" in found.remedy
    assert "add column id bigint generated always as identity primary key" in found.remedy
    assert not found.fixes


async def test_a_table_of_others_whose_updates_fail(healthy: Patients) -> None:
    await healthy.sql(
        "create table public.loose (a int)", "alter publication supabase_realtime add table loose"
    )
    try:
        (found,) = await healthy.wrong()
        assert (found.name, found.state, found.fixes) == ("publication", "warning", ())
        assert "UPDATE and DELETE of public.loose fail for everybody" in found.detail
        await healthy.sql(statement(found))
        await healthy.sql("update public.loose set a = 1")
        assert await healthy.wrong() == []
    finally:
        await healthy.sql("drop table public.loose")


# Rights and policies


async def test_tables_of_the_future_are_granted_to_nobody(healthy: Patients) -> None:
    await healthy.sql("alter default privileges in schema public revoke all on tables from service_role")
    notes = [one for one in await healthy.findings() if one.state == "note" and one.name == "grants"]
    assert notes[0].detail.startswith("tables that postgres makes in schema public are granted")
    await healthy.sql(notes[0].remedy.partition("run: ")[2])
    assert not [one for one in await healthy.findings() if one.state == "note" and one.name == "grants"]


@pytest.fixture
async def app(healthy: Patients) -> Patients:
    """A user of its own, which may do what Tailrace needs, and owns nothing."""
    await healthy.sql(
        "drop role if exists app",
        "create role app login replication password 'hunter2'",
        "grant usage on schema tailrace to app",
        "grant select, insert, update, delete on all tables in schema tailrace to app",
        "grant select on public.orders to app",
    )
    return healthy


async def test_a_user_who_lacks_rights_and_one_who_sees_not_all_rows(app: Patients) -> None:
    by_app = {"DATABASE_URL": app.postgres.dsn(user="app", password="hunter2"), "WORKER_DELIVERY": "plain"}
    by_app["HANDLERS"] = "patients_inserts"
    try:
        assert await app.wrong(**by_app) == []
        await app.sql("revoke update on tailrace.held from app")
        (found,) = await app.wrong(**by_app)
        assert found.detail == "app may not read and write tailrace.held"
        await app.sql(statement(found))
        await app.sql("alter table public.orders enable row level security")
        (found,) = await app.wrong(**by_app)
        assert (found.name, found.state) == ("row security", "problem")
        assert "hides rows of public.orders from app" in found.detail
        await app.sql(statement(found))
        assert await app.wrong(**by_app) == []
        # Deletes in plain delivery: nothing to be mended, but good to know.
        notes = [one for one in await app.findings(**by_app) if one.name == "row security"]
        assert "told as its DELETE alone" in notes[0].detail
    finally:
        await app.sql('drop policy if exists "all rows for app" on public.orders', "drop owned by app")
        await app.sql("drop role app")


async def test_service_role_that_sees_not_all_rows(healthy: Patients) -> None:
    await healthy.sql(
        "alter table public.orders enable row level security", "alter role service_role nobypassrls"
    )
    in_plain = {"WORKER_DELIVERY": "plain", "HANDLERS": "patients_inserts"}
    try:
        (plain,) = await healthy.wrong(**in_plain)
        proven = await healthy.wrong()
    finally:
        await healthy.sql("alter role service_role bypassrls")
    assert "from service_role: Realtime does not tell their changes" in plain.detail
    assert 'alter role "service_role" bypassrls' in plain.remedy
    assert proven == []
    assert await healthy.wrong(**in_plain) == []


async def test_roles_that_handlers_run_as(app: Patients) -> None:
    by_app = {"DATABASE_URL": app.postgres.dsn(user="app", password="hunter2"), "WORKER_DELIVERY": "plain"}
    (app.directory / "patients_roles.py").write_text(
        "from worker import Handlers\n\non = Handlers()\n\n\n"
        '@on.insert("public.orders", name="as_user", role="authenticated")\n'
        "async def as_user(change, session): ...\n\n\n"
        '@on.insert("public.orders", name="as_nobody", role="nobody_at_all")\n'
        "async def as_nobody(change, session): ...\n"
    )
    await app.sql("alter table public.orders enable row level security", "alter role app bypassrls")
    try:
        found = await app.wrong(**by_app, HANDLERS="patients_roles")
        details = [one.detail for one in found]
        assert details == [
            "app may not take on role authenticated, as which as_user runs",
            "as_nobody runs as role nobody_at_all, which does not exist",
            "as_user runs as authenticated, and sees no row of public.orders: no policy is for it",
        ]
        await app.sql(
            statement(found[0]),
            "create role nobody_at_all in role authenticated",
            "grant nobody_at_all to app",
            "create policy own on public.orders for select to authenticated using (customer_id = 1)",
        )
        assert await app.wrong(**by_app, HANDLERS="patients_roles") == []
    finally:
        await app.sql("drop owned by app", "drop role app", "drop role if exists nobody_at_all")


# Slots


async def test_a_slot_that_is_left_is_dropped_for_one_who_names_it(healthy: Patients) -> None:
    await healthy.sql(
        "select pg_create_logical_replication_slot('left_one', 'pgoutput')",
        "select pg_create_logical_replication_slot('left_two', 'pgoutput')",
    )
    slots = (
        "select array_agg(slot_name::text order by 1) from pg_replication_slots where slot_name like 'left_%'"
    )
    try:
        found = await healthy.wrong()
        assert [one.name for one in found] == ["slots", "slots"]
        assert '"left_one" (pgoutput) is read by nobody and keeps ' in found[0].detail
        assert "up to 2GB" in found[0].detail
        assert await healthy.mended(found) == []
        code, output, errors = await healthy.tailrace(
            "check", "--fix", "--yes", "--drop-slot", "left_one", "--drop-slot", "never_there"
        )
        assert (code, errors) == (1, "")
        assert "ran      select pg_drop_replication_slot('left_one');" in output
        assert "failed   --drop-slot never_there" in output
        assert await healthy.value(slots) == ["left_two"]
    finally:
        await healthy.sql(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active"
        )
    assert await healthy.wrong() == []


async def test_our_own_slot_is_dropped_only_where_the_delivery_does_without(healthy: Patients) -> None:
    await healthy.sql("select pg_create_logical_replication_slot('tailrace', 'pgoutput')")
    try:
        assert await healthy.wrong(WORKER_DELIVERY="proven") == []
        (left,) = await healthy.wrong(WORKER_DELIVERY="plain")
        assert '"tailrace" (pgoutput) is read by nobody' in left.detail
        (done,) = await healthy.mended([left], ["tailrace"], WORKER_DELIVERY="plain")
        assert done.error == ""
        assert await healthy.wrong(WORKER_DELIVERY="plain") == []
    finally:
        await healthy.sql(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active"
        )


# Redis


async def test_a_redis_that_evicts_is_mended_where_it_is_ours_alone(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.flushall()
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            (warned,) = await healthy.wrong()
            await redis.config_set("maxmemory", "1gb")
            await redis.set("of somebody else", "1")
            (shared,) = await healthy.wrong()
            await redis.delete("of somebody else")
            (alone,) = await healthy.wrong()
            (done,) = await healthy.mended([alone])
            assert await healthy.wrong() == []
        finally:
            await redis.config_set("maxmemory", "0")
            await redis.config_set("maxmemory-policy", "noeviction")
    assert "allkeys-lru" in warned.detail
    assert (warned.state, shared.state, alone.state) == ("warning", "problem", "problem")
    assert shared.fixes == ()
    assert (done.words, done.error) == ("config set maxmemory-policy noeviction", "")


# The command


async def test_all_at_once_by_the_command(healthy: Patients) -> None:
    await healthy.sql(
        "drop schema tailrace cascade",
        "drop publication supabase_realtime",
        "alter table public.orders replica identity default",
        "revoke select on public.orders from service_role",
    )
    code, output, _ = await healthy.tailrace("check", "--fix", "--yes", "--json")
    told = json.loads(output)
    assert code == 0, told
    assert told["ok"] is True
    assert [one["error"] for one in told["ran"]] == [""] * len(told["ran"])
    assert {one["words"] for one in told["ran"]} >= {
        "create publication supabase_realtime for table public.orders;",
        "alter table public.orders replica identity full;",
        "python -m worker migrate",
    }


async def test_what_a_user_may_not_mend_is_told_in_the_words_of_postgres(app: Patients) -> None:
    await app.sql("alter publication supabase_realtime drop table public.orders")
    by_app = {"DATABASE_URL": app.postgres.dsn(user="app", password="hunter2"), "WORKER_DELIVERY": "plain"}
    try:
        (done,) = await app.mended(await app.wrong(**by_app), **by_app)
    finally:
        await app.sql("drop owned by app", "drop role app")
    assert "must be owner of publication" in done.error


async def test_a_lock_of_others_is_not_waited_for_long(healthy: Patients) -> None:
    await healthy.sql("alter table public.orders replica identity default")
    found = [one for one in await healthy.wrong() if one.fixes]
    holder = await healthy.connect()
    try:
        async with holder.transaction():
            await holder.execute("lock table public.orders")
            (done,) = await healthy.mended(found)
    finally:
        await holder.close()
    assert "somebody else has locked it" in done.error


async def test_nobody_is_asked_where_there_is_no_terminal(healthy: Patients) -> None:
    unasked, alone = await asyncio.gather(
        healthy.tailrace("check", "--fix"), healthy.tailrace("check", "--drop-slot", "tailrace")
    )
    assert unasked[0] == alone[0] == 2
    assert "--fix needs --yes" in unasked[2]
    assert "belong to --fix" in alone[2]


async def test_a_person_is_asked_first_and_shown_what_would_be_run(healthy: Patients) -> None:
    await healthy.sql("alter table public.orders replica identity default")
    statement = "alter table public.orders replica identity full;"
    code, output, _ = await healthy.tailrace("check", "--fix", answer="n")
    assert code == 1
    assert f"to be run:\n  {statement}\nRun this? [y/N]" in output
    assert "nothing was run" in output
    code, output, _ = await healthy.tailrace("check", "--fix", answer="y")
    assert code == 0
    assert f"ran      {statement}" in output


LOOKS_BACK = """
from worker import Handlers

on = Handlers()


@on.update("public.orders", name="moved")
async def moved(change, session):
    return [name for name in change.record if change.old_record[name] != change.record[name]]


@on.update("public.orders", name="seen")
async def seen(change, session):
    return change.record
"""


async def test_a_handler_that_uses_old_rows_of_which_only_the_key_is_told(healthy: Patients) -> None:
    (healthy.directory / "patients_looking_back.py").write_text(LOOKS_BACK)
    await healthy.sql("alter table public.orders replica identity default")
    wanted = {"HANDLERS": "patients_looking_back"}
    (found,) = await healthy.wrong(**wanted)
    assert found.detail == "moved uses old_record, which has id alone of public.orders"
    (done,) = await healthy.mended([found], **wanted)
    assert done == ('alter table "public"."orders" replica identity full;', "")
    assert await healthy.wrong(**wanted) == []


async def test_migrations_of_the_handlers_that_are_missing_and_then_run(healthy: Patients) -> None:
    package = healthy.directory / "patients_package"
    versions = package / "migrations" / "versions"
    versions.mkdir(parents=True)
    (package / "__init__.py").write_text(INSERTS)
    example = ROOT / "handlers" / "migrations" / "env.py"
    (package / "migrations" / "env.py").write_text(
        example.read_text().replace("handlers_version", "of_package")
    )
    (versions / "one.py").write_text(
        'from alembic import op\n\nrevision = "one"\ndown_revision = None\n\n\n'
        'def upgrade():\n    op.execute("create table derived_of_package (id int)")\n'
    )
    try:
        answers = [
            await healthy.tailrace("check", *words, "--json", HANDLERS="patients_package")
            for words in ([], ["--fix", "--yes"])
        ]
        there = await healthy.value("select to_regclass('derived_of_package') is not null")
    finally:
        await healthy.sql("drop table if exists derived_of_package, of_package")
    (before, text, _), (after, mended, _) = answers
    (problem,) = [one for one in json.loads(text)["findings"] if one["state"] == "problem"]
    assert (before, after, there) == (1, 0, True)
    assert problem["name"] == "migrations"
    assert problem["detail"] == "patients_package/migrations: the database is at none, the handlers need one"
    told = [one["detail"] for one in json.loads(mended)["findings"] if one["name"] == "migrations"]
    assert "patients_package/migrations: current (one)" in told
