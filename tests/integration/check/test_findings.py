"""What the doctor finds on real servers, each of them made ill in turn; how it mends is in test_fixes.py."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import jwt
import pytest
from redis.asyncio import Redis

from standin.server import LOCAL_JWT_SECRET
from tests.integration.check.patients import Patients
from tests.integration.wal.pooler import pooled
from worker.check import slots
from worker.check.clocks import Clock, judge_clocks
from worker.check.findings import Finding

NAMES = {
    "settings",
    "handlers",
    "key",
    "jwks",
    "delivery",
    "slots",
    "max_slot_wal_keep_size",
    "pooler",
    "database",
    "migrations",
    "tables",
    "publication",
    "grants",
    "redis",
    "arq",
    "realtime",
    "clocks",
}


def of(name: str, findings: list[Finding]) -> list[Finding]:
    return [one for one in findings if one.name == name]


async def test_all_is_well(healthy: Patients) -> None:
    code, output, errors = await healthy.tailrace("check", "--json")
    told = json.loads(output)
    findings = told["findings"]
    assert (code, errors, told["ok"]) == (0, "", True), findings
    assert {finding["name"] for finding in findings} == NAMES
    assert {finding["state"] for finding in findings} <= {"ok", "note"}


async def test_a_problem_is_1_with_its_remedy_in_both_forms(healthy: Patients) -> None:
    await healthy.sql("revoke select on public.orders from service_role")
    as_json, (code, output, errors) = await asyncio.gather(
        healthy.tailrace("check", "--json"), healthy.tailrace("check")
    )
    assert (as_json[0], code, errors) == (1, 1, "")
    told = json.loads(as_json[1])
    assert told["ok"] is False
    (problem,) = [one for one in told["findings"] if one["name"] == "grants"]
    assert problem["detail"] == "service_role may not select from public.orders"
    assert problem["remedy"] == "run: " + " ".join(problem["fixes"])
    for part in (problem["detail"], problem["remedy"], "check --fix"):
        assert part in output


# Keys


def signed(secret: str = LOCAL_JWT_SECRET, **claims: object) -> str:
    known = {"role": "service_role", "exp": int(time.time()) + 400 * 86_400}
    return jwt.encode({name: value for name, value in (known | claims).items() if value is not None}, secret)


@pytest.mark.parametrize(
    ("claims", "state", "words"),
    [
        ({}, "ok", "JWT of role service_role, until "),
        ({"exp": 1_600_000_000}, "problem", "has expired (2020-09-13)"),
        ({"exp": int(time.time()) + 86_400}, "warning", "Realtime refuses it from then on"),
        ({"exp": None}, "problem", "no end (exp)"),
        ({"role": "reporter"}, "warning", "is of role reporter"),
    ],
    ids=["good", "expired", "expires soon", "no end", "another role"],
)
async def test_the_kind_and_the_end_of_the_key(
    healthy: Patients, claims: dict[str, object], state: str, words: str
) -> None:
    findings = await healthy.findings(SUPABASE_SERVICE_ROLE_KEY=signed(**claims))
    (found,) = of("key", findings)
    assert found.state == state
    assert words in found.detail


async def test_a_key_of_another_project_and_of_another_secret(healthy: Patients) -> None:
    # Nobody is asked: the host does not exist, and what else is found then is not looked at.
    elsewhere = {
        "SUPABASE_URL": "https://abcdefgh.supabase.co",
        "REALTIME_URL": healthy.realtime.realtime_url,
    }
    key = signed(ref="ijklmnop")
    findings = await healthy.problems(
        **elsewhere, SUPABASE_SERVICE_ROLE_KEY=key, SUPABASE_JWT_SECRET="x" * 40
    )
    details = [one.detail for one in of("key", findings)]
    assert details == [
        "SUPABASE_SERVICE_ROLE_KEY is of project ijklmnop, and SUPABASE_URL of abcdefgh",
        "SUPABASE_SERVICE_ROLE_KEY is not signed with SUPABASE_JWT_SECRET",
    ]


async def test_a_new_key_is_told_with_its_24_hours(healthy: Patients) -> None:
    (found,) = of("key", await healthy.findings(SUPABASE_SERVICE_ROLE_KEY="sb_secret_hello"))
    assert found.state == "ok"
    assert "24 hours" in found.detail


async def test_a_key_with_a_wrong_signature(healthy: Patients) -> None:
    key = signed("another secret of at least 32 characters")
    (problem,) = await healthy.problems(SUPABASE_SERVICE_ROLE_KEY=key)
    assert problem.name == "realtime"
    assert "SUPABASE_SERVICE_ROLE_KEY" in problem.detail + problem.remedy


@asynccontextmanager
async def publishing(body: str) -> AsyncIterator[str]:
    """A project that answers every request with these keys; gives its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("body", "secret", "state", "words"),
    [
        ('{"keys": [{"kty": "EC", "alg": "ES256", "kid": "1"}]}', "", "ok", "1 public keys (ES256)"),
        ('{"keys": []}', "", "note", "publishes no keys"),
        ('{"keys": []}', LOCAL_JWT_SECRET, "ok", "verified by SUPABASE_JWT_SECRET"),
        ("<html>", "", "note", "cannot be had"),
    ],
    ids=["keys", "none", "none, but a secret", "no key set"],
)
async def test_the_public_keys_of_the_project(
    healthy: Patients, body: str, secret: str, state: str, words: str
) -> None:
    async with publishing(body) as url:
        given = {"SUPABASE_URL": url, "REALTIME_URL": healthy.realtime.realtime_url}
        (found,) = of("jwks", await healthy.findings(**given, SUPABASE_JWT_SECRET=secret))
    assert found.state == state
    assert words in found.detail


# Database


async def test_a_database_of_a_newer_version(healthy: Patients) -> None:
    await healthy.sql("update tailrace.migration set version_num = '9999'")
    try:
        (problem,) = await healthy.problems()
    finally:
        await healthy.sql("drop schema tailrace cascade")
    assert problem.name == "migrations"
    assert "9999" in problem.detail
    assert "newer" in problem.remedy
    assert not problem.fixes


async def test_a_table_that_does_not_exist_and_one_that_is_a_view(healthy: Patients) -> None:
    await healthy.sql("drop table public.orders")
    found = await healthy.problems()
    assert any("there is no table public.orders" in one.detail for one in found)
    await healthy.sql("create view public.orders as select 1 as customer_id")
    try:
        found = await healthy.problems()
    finally:
        await healthy.sql("drop view public.orders")
    assert any("public.orders is a view" in one.remedy for one in found)


async def test_a_wrong_password(healthy: Patients) -> None:
    (problem,) = await healthy.problems(DATABASE_URL=healthy.postgres.dsn(password="hunter2"))
    assert problem.name == "database"
    assert "user or password of DATABASE_URL" in problem.detail


async def test_two_urls_that_lead_to_different_databases(healthy: Patients) -> None:
    await healthy.sql("create database elsewhere")
    try:
        found = await healthy.problems(DATABASE_DIRECT_URL=healthy.postgres.dsn("elsewhere"))
    finally:
        await healthy.sql("drop database elsewhere with (force)")
    (problem,) = of("pooler", found)
    assert "lead to different databases" in problem.detail


async def test_a_direct_url_that_is_away(healthy: Patients) -> None:
    away = "postgresql://postgres:hunter2@127.0.0.1:1/postgres"
    found = await healthy.problems(DATABASE_DIRECT_URL=away)
    (problem,) = of("pooler", found)
    assert problem.detail.startswith("DATABASE_DIRECT_URL: Postgres cannot be reached")


async def test_connections_that_run_short(healthy: Patients) -> None:
    async with healthy.server(max_connections=14):
        (found,) = of("database", await healthy.wrong())
    assert "connections are in use" in found.detail


async def test_a_partitioned_table_whose_changes_come_under_other_names(healthy: Patients) -> None:
    await healthy.sql(
        "drop table public.orders",
        "create table public.orders (id bigint primary key, customer_id bigint) partition by range (id)",
        "create table public.orders_1 partition of public.orders for values from (0) to (1000)",
        "alter publication supabase_realtime add table public.orders",
    )
    found = [one for one in of("tables", await healthy.problems()) if "not in publication" in one.detail]
    assert found
    assert all("name the partitions in the handler" in one.remedy and not one.fixes for one in found)


# The delivery and its slots


async def test_proven_delivery_and_the_way_to_the_log(healthy: Patients) -> None:
    (found,) = of("delivery", await healthy.findings(WORKER_DELIVERY="proven"))
    assert found.state == "ok"
    assert "proven" in found.detail
    assert "streamed: DATABASE_URL allows a replication connection" in found.detail


async def test_proven_delivery_with_a_user_that_may_not_replicate(healthy: Patients) -> None:
    await healthy.sql(
        "create role app login password 'hunter2'",
        "grant all on schema tailrace to app",
        "grant all on all tables in schema tailrace to app",
        "grant select on public.orders to app",
    )
    wanted = {
        "DATABASE_URL": healthy.postgres.dsn(user="app", password="hunter2"),
        "WORKER_DELIVERY": "proven",
    }
    try:
        found = await healthy.problems(**wanted)
        code, _, errors = await healthy.tailrace("listen", **wanted, PORT="0")
        plain = await healthy.findings(**wanted | {"WORKER_DELIVERY": "auto"})
    finally:
        await healthy.sql("drop owned by app", "drop role app")
    (problem,) = of("delivery", found)
    assert problem.detail == 'WORKER_DELIVERY=proven: the user "app" may not replicate'
    assert 'alter role "app" replication' in problem.remedy
    assert code == 2
    assert 'alter role "app" replication' in errors
    assert "hunter2" not in errors
    assert not any(one.is_wrong for one in plain), plain
    (chosen,) = of("delivery", plain)
    assert chosen.detail.startswith("plain (WORKER_DELIVERY=auto, and proven delivery cannot be had: ")
    assert 'alter role "app" replication' in chosen.detail


async def test_a_slot_that_is_not_ours(healthy: Patients) -> None:
    await healthy.sql("select pg_create_physical_replication_slot('foreign_one')")
    try:
        found = await healthy.problems(WORKER_DELIVERY="proven", WORKER_SLOT="foreign_one")
        auto = await healthy.findings(WORKER_DELIVERY="auto", WORKER_SLOT="foreign_one")
    finally:
        await healthy.sql("select pg_drop_replication_slot('foreign_one')")
    (problem,) = of("delivery", found)
    assert "uses the plugin of physical replication, not pgoutput" in problem.detail
    assert "WORKER_SLOT" in problem.detail
    (chosen,) = of("delivery", auto)
    assert chosen.detail.startswith("plain (WORKER_DELIVERY=auto, and proven delivery cannot be had: ")
    assert "foreign_one" in chosen.detail


async def test_what_our_own_slot_keeps(healthy: Patients) -> None:
    await healthy.sql("select pg_create_logical_replication_slot('kept', 'pgoutput')")
    try:
        findings = await healthy.findings(WORKER_DELIVERY="proven", WORKER_SLOT="kept")
    finally:
        await healthy.sql("select pg_drop_replication_slot('kept')")
    (slot,) = of("slot", findings)
    assert slot.state == "ok"
    assert slot.detail.startswith('"kept" keeps ')
    assert not any(one.fixes for one in findings)


async def test_how_long_the_log_is_kept_at_the_usual_rate(
    healthy: Patients, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How old the statistics are is the cluster's affair: its template may be hours old, or just made.
    monkeypatch.setattr(slots, "LEAST_SAMPLE_SECONDS", 1e9)
    (unknown,) = of("max_slot_wal_keep_size", await healthy.findings(WORKER_DELIVERY="proven"))
    assert (unknown.state, unknown.detail) == ("ok", "2GB")  # statistics are young
    monkeypatch.setattr(slots, "LEAST_SAMPLE_SECONDS", 0)
    monkeypatch.setattr(slots, "LEAST_HOURS", 0)
    (known,) = of("max_slot_wal_keep_size", await healthy.findings(WORKER_DELIVERY="proven"))
    assert known.state == "ok"
    assert re.fullmatch(
        r"2GB: at .* of log a minute, the average, enough for [\d.]+ (hours|days)", known.detail
    )
    monkeypatch.setattr(slots, "LEAST_HOURS", 1e9)
    (short,) = of("max_slot_wal_keep_size", await healthy.findings(WORKER_DELIVERY="proven"))
    assert short.state == "warning"
    assert re.match(r"run: alter system set max_slot_wal_keep_size = '\d+GB'; select pg_reload", short.remedy)


async def test_a_server_that_cannot_be_decoded(healthy: Patients) -> None:
    nowhere = {"REALTIME_URL": "ws://127.0.0.1:1/socket"}  # the stand-in would take its time to give up
    async with healthy.server(wal_level="replica"):
        found = await healthy.problems(**nowhere)
        proven = await healthy.problems(**nowhere, WORKER_DELIVERY="proven")
    (problem,) = of("database", found)
    assert problem.detail == "wal_level is replica; Realtime needs logical"
    assert "alter system set wal_level = logical" in problem.remedy
    (delivery,) = of("delivery", proven)
    assert "wal_level is replica" in delivery.detail


async def test_a_slot_that_has_lost_its_log_and_a_server_without_limits(healthy: Patients) -> None:
    await healthy.sql(
        "select pg_create_logical_replication_slot('tailrace', 'pgoutput')",
        "select pg_create_logical_replication_slot('of_others', 'pgoutput')",
    )
    try:
        async with healthy.server(max_slot_wal_keep_size="1MB", idle_replication_slot_timeout="1d"):
            for _ in range(4):
                await healthy.sql(
                    "create table filler as select 1", "drop table filler", "select pg_switch_wal()"
                )
            await healthy.sql("checkpoint")
            found = await healthy.wrong(WORKER_DELIVERY="proven")
        async with healthy.server(max_slot_wal_keep_size="-1"):
            unlimited = await healthy.wrong(WORKER_DELIVERY="proven")
    finally:
        await healthy.sql(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active"
        )
    (own,) = of("slot", found)
    assert (own.state, 'the replication slot "tailrace" has lost the log' in own.detail) == ("warning", True)
    others, idle = of("slots", found)
    assert '"of_others" (pgoutput) has lost its log' in others.detail
    assert "idle_replication_slot_timeout is 1d" in idle.detail
    (limit,) = of("max_slot_wal_keep_size", unlimited)
    assert "until the disk is full" in limit.detail
    assert "alter system set max_slot_wal_keep_size = '4GB'" in limit.remedy


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
async def test_what_stands_between_us_and_postgres(healthy: Patients) -> None:
    async with pooled(healthy.postgres.dsn(), size=20) as pooler:
        found = await healthy.findings(DATABASE_URL=pooler, WORKER_DELIVERY="proven")
        wrong = await healthy.wrong(DATABASE_DIRECT_URL=pooler, WORKER_DELIVERY="proven")
    (way,) = of("pooler", found)
    assert (way.state, way.detail) == ("ok", "DATABASE_URL is a transaction pooler")
    (delivery,) = of("delivery", found)
    assert "read in windows by SQL" in delivery.detail
    assert "DATABASE_DIRECT_URL" in delivery.remedy
    (direct,) = of("pooler", wrong)
    assert direct.state == "warning"
    assert "DATABASE_DIRECT_URL leads to a transaction pooler" in direct.detail


# Redis


async def test_redis_that_wants_a_password_or_none(healthy: Patients) -> None:
    wrong = healthy.redis.url.replace("redis://", "redis://:hunter2@")
    (unwanted,) = await healthy.problems(REDIS_URL=wrong)
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.config_set("requirepass", "right")
        try:
            (missing,) = await healthy.problems()
            (refused,) = await healthy.problems(REDIS_URL=wrong)
        finally:
            await redis.config_set("requirepass", "")
    for problem in (unwanted, missing, refused):
        assert problem.name == "redis"
        assert "password" in problem.detail


async def test_redis_is_away(healthy: Patients) -> None:
    (problem,) = await healthy.problems(REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    assert problem.name == "redis"


async def test_redis_that_is_nearly_full_or_smaller_than_the_backlog(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        used = (await redis.info("memory"))["used_memory"]
        await redis.config_set("maxmemory", int(used * 1.1))
        try:
            found = [one.detail for one in await healthy.wrong()]
        finally:
            await redis.config_set("maxmemory", 0)
    assert any("writes are refused when it is full" in one for one in found)
    assert any("less than WORKER_MAX_BACKLOG_BYTES" in one for one in found)


async def test_redis_that_is_a_replica(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.replicaof("127.0.0.1", "1")
        try:
            found = await healthy.problems()
        finally:
            await redis.replicaof("NO", "ONE")
    assert any("this Redis is a replica" in one.detail for one in found)


async def test_a_queue_of_somebody_else(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.set("taken", "by somebody")
        await redis.zadd("shared", {"theirs": 1.0})
        await redis.set("arq:job:theirs", '{"f": "send_mail"}')
        try:
            (kind,) = await healthy.problems(WORKER_QUEUE="taken")
            (jobs,) = await healthy.problems(WORKER_QUEUE="shared")
        finally:
            await redis.delete("taken", "shared", "arq:job:theirs")
    assert kind.name == jobs.name == "arq"
    assert "is no queue but a string" in kind.detail
    assert "jobs of somebody else" in jobs.detail
    assert "WORKER_QUEUE" in jobs.remedy


async def test_jobs_that_wait_while_no_worker_lives(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.zadd("idle", {"ours": time.time() * 1000 - 60_000})
        await redis.set("arq:job:ours", '{"f": "drain"}')
        try:
            (found,) = await healthy.wrong(WORKER_QUEUE="idle")
            await redis.set("idle:worker:one", "")
            later = await healthy.wrong(WORKER_QUEUE="idle")
        finally:
            await redis.delete("idle", "arq:job:ours", "idle:worker:one")
    assert (found.name, found.state) == ("arq", "warning")
    assert "no worker lives" in found.detail
    assert later == []


async def test_plain_delivery_on_a_redis_that_keeps_nothing(healthy: Patients) -> None:
    notes = [one for one in await healthy.findings(WORKER_DELIVERY="plain") if one.state == "note"]
    assert any("a restart of Redis is a gap" in one.detail for one in notes)


# Realtime, and the time


async def test_realtime_elsewhere(healthy: Patients) -> None:
    (problem,) = await healthy.problems(REALTIME_URL="ws://127.0.0.1:1/socket")
    assert problem.name == "realtime"
    assert "cannot be reached" in problem.detail


@pytest.mark.parametrize(("seconds", "state"), [(5.0, "warning"), (-60.0, "problem")])
async def test_a_clock_that_is_wrong_is_ours_where_all_others_agree(
    healthy: Patients, seconds: float, state: str
) -> None:
    code, output, errors = await healthy.tailrace("check", "--json", shifted=seconds)
    assert (code, errors) == (int(state == "problem"), "")
    (found,) = [one for one in json.loads(output)["findings"] if one["name"] == "clocks"]
    assert found["state"] == state
    assert found["detail"].startswith("this machine's clock is ")
    assert ("ahead of" if seconds > 0 else "behind") in found["detail"]
    assert "NTP" in found["remedy"]


def test_a_clock_of_one_server_that_is_wrong_is_named() -> None:
    clocks = [Clock("Postgres", 0.0), Clock("Redis", -30.0), Clock("Supabase", 0.0)]
    (found,) = judge_clocks(clocks)
    assert found.state == "problem"
    assert found.detail.startswith("the clock of Redis is 30.0 s behind this machine's")


async def test_status_without_a_listener_comes_from_the_database(healthy: Patients) -> None:
    code, output, errors = await healthy.tailrace("status", "--json", PORT="1")
    assert (code, errors) == (1, "")
    told = json.loads(output)
    assert told["ready"] is False
    assert told["reasons"][0].startswith("no listener answers on 127.0.0.1:1")
    assert told["handlers"] == {}
