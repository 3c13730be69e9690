"""The doctor and its patients: embedded Postgres and Redis and the stand-in Realtime, made ill in turn."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import asyncpg
import jwt
import pytest
from redis.asyncio import Redis

from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from standin.server import LOCAL_JWT_SECRET, Standin

HANDLERS = """
from worker import Handlers

on = Handlers()


@on.insert("public.orders", name="orders")
async def orders(change, session): ...
"""


class Patients(NamedTuple):
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis
    realtime: Standin
    directory: Path

    def settings(self) -> dict[str, str]:
        return {
            "SUPABASE_URL": self.realtime.supabase_url,
            "REALTIME_URL": self.realtime.realtime_url,
            "SUPABASE_SERVICE_ROLE_KEY": self.realtime.service_role_key,
            "DATABASE_URL": self.postgres.dsn(),
            "REDIS_URL": self.redis.url,
            "HANDLERS": "shop",
        }

    async def sql(self, *statements: str) -> None:
        connection = await asyncpg.connect(self.postgres.dsn())
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    async def tailrace(self, *arguments: str, **settings: str) -> tuple[int, str, str]:
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "worker",
            *arguments,
            cwd=self.directory,
            env=environment | self.settings() | settings,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    async def check(self, **settings: str) -> tuple[int, list[dict[str, str]]]:
        code, output, errors = await self.tailrace("check", "--json", **settings)
        assert not errors, errors
        told = json.loads(output)
        assert told["ok"] is (code == 0)
        return code, told["findings"]

    async def problems(self, **settings: str) -> list[dict[str, str]]:
        """What ails them, which must be something."""
        code, findings = await self.check(**settings)
        assert code == 1
        return [finding for finding in findings if finding["state"] == "problem"]


@pytest.fixture(scope="module")
async def patients(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Patients]:
    directory = tmp_path_factory.mktemp("patients")
    (directory / "shop.py").write_text(HANDLERS)
    async with (
        EmbeddedPostgres(directory / "postgres") as postgres,
        EmbeddedRedis(directory / "redis") as redis,
    ):
        await bootstrap_supabase(postgres.dsn())
        async with Standin(postgres.dsn(), jwt_secret=LOCAL_JWT_SECRET) as realtime:
            yield Patients(postgres, redis, realtime, directory)


@pytest.fixture
async def healthy(patients: Patients) -> AsyncIterator[Patients]:
    await patients.sql(
        "drop table if exists public.orders",
        "create table public.orders (id bigint primary key, status text)",
        "grant select on public.orders to service_role",
        "alter publication supabase_realtime add table public.orders",
    )
    code, _, errors = await patients.tailrace("migrate")
    assert code == 0, errors
    yield patients
    await patients.sql("drop table if exists public.orders")


async def test_all_is_well(healthy: Patients) -> None:
    code, findings = await healthy.check()
    assert code == 0, findings
    assert {finding["name"] for finding in findings} == {
        "settings",
        "handlers",
        "delivery",
        "database",
        "migrations",
        "tables",
        "publication",
        "grants",
        "redis",
        "realtime",
    }
    assert {finding["state"] for finding in findings} == {"ok"}


async def test_migrations_that_are_missing_and_then_run(patients: Patients) -> None:
    await patients.sql(
        "drop schema if exists tailrace cascade",
        "create table if not exists public.orders (id bigint primary key, status text)",
        "grant select on public.orders to service_role",
    )
    found = await patients.problems()
    (migrations,) = [finding for finding in found if finding["name"] == "migrations"]
    assert migrations["remedy"] == "run: python -m worker migrate"


async def test_a_database_of_a_newer_version(healthy: Patients) -> None:
    await healthy.sql("update tailrace.migration set version_num = '9999'")
    try:
        (problem,) = await healthy.problems()
    finally:
        await healthy.sql("drop schema tailrace cascade")
    assert problem["name"] == "migrations"
    assert "9999" in problem["detail"]
    assert "newer" in problem["remedy"]


async def test_a_table_outside_the_publication(healthy: Patients) -> None:
    await healthy.sql("alter publication supabase_realtime drop table public.orders")
    found = await healthy.problems()
    (tables,) = [finding for finding in found if finding["name"] == "tables"]
    assert "public.orders is not in publication supabase_realtime" in tables["detail"]
    assert tables["remedy"] == "run: alter publication supabase_realtime add table public.orders;"
    await healthy.sql(tables["remedy"].removeprefix("run: "))
    assert (await healthy.check())[0] == 0


async def test_the_canary_outside_the_publication(healthy: Patients) -> None:
    await healthy.sql("alter publication supabase_realtime drop table tailrace.canary")
    (problem,) = await healthy.problems()
    assert problem["name"] == "publication"
    await healthy.sql(problem["remedy"].removeprefix("run: "))
    assert (await healthy.check())[0] == 0


async def test_a_publication_that_does_not_exist(healthy: Patients) -> None:
    found = await healthy.problems(WORKER_PUBLICATION="nowhere")
    (problem,) = [finding for finding in found if finding["name"] == "publication"]
    assert "nowhere does not exist" in problem["detail"]
    assert "create publication nowhere" in problem["remedy"]


async def test_a_table_that_service_role_may_not_read(healthy: Patients) -> None:
    await healthy.sql("revoke select on public.orders from service_role")
    found = await healthy.problems()
    (problem,) = [finding for finding in found if finding["name"] == "grants"]
    assert problem["detail"] == "service_role may not select from public.orders"
    await healthy.sql(problem["remedy"].removeprefix("run: "))
    assert (await healthy.check())[0] == 0


async def test_a_table_that_does_not_exist(healthy: Patients) -> None:
    await healthy.sql("drop table public.orders")
    found = await healthy.problems()
    assert any("there is no table public.orders" in finding["detail"] for finding in found)


async def test_a_table_without_a_primary_key(healthy: Patients) -> None:
    await healthy.sql("alter table public.orders drop constraint orders_pkey")
    found = await healthy.problems()
    assert any("has no primary key" in finding["detail"] for finding in found)


async def test_a_wrong_password(healthy: Patients) -> None:
    (problem,) = await healthy.problems(DATABASE_URL=healthy.postgres.dsn(password="hunter2"))
    assert problem["name"] == "database"
    assert "user or password of DATABASE_URL" in problem["detail"]
    assert "hunter2" not in json.dumps(problem)


async def test_a_key_with_a_wrong_signature(healthy: Patients) -> None:
    key = jwt.encode({"role": "service_role", "exp": 4102444800}, "another secret of at least 32 characters")
    (problem,) = await healthy.problems(SUPABASE_SERVICE_ROLE_KEY=key)
    assert problem["name"] == "realtime"
    assert "SUPABASE_SERVICE_ROLE_KEY" in problem["detail"] + problem["remedy"]
    assert key not in json.dumps(problem)


async def test_realtime_elsewhere(healthy: Patients) -> None:
    (problem,) = await healthy.problems(REALTIME_URL="ws://127.0.0.1:1/socket")
    assert problem["name"] == "realtime"
    assert "cannot be reached" in problem["detail"]


async def test_redis_that_evicts(healthy: Patients) -> None:
    async with Redis.from_url(healthy.redis.url) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            code, findings = await healthy.check()
            warnings = [finding for finding in findings if finding["state"] == "warning"]
            assert code == 0
            assert "allkeys-lru" in warnings[0]["detail"]
            await redis.config_set("maxmemory", "64mb")
            (problem,) = await healthy.problems()
        finally:
            await redis.config_set("maxmemory", "0")
            await redis.config_set("maxmemory-policy", "noeviction")
    assert problem["name"] == "redis"
    assert "noeviction" in problem["remedy"]


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
        assert problem["name"] == "redis"
        assert "password" in problem["detail"]
        assert "hunter2" not in json.dumps(problem)


async def test_redis_is_away(healthy: Patients) -> None:
    (problem,) = await healthy.problems(REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    assert problem["name"] == "redis"
    assert "hunter2" not in json.dumps(problem)


async def test_status_without_a_listener_comes_from_the_database(healthy: Patients) -> None:
    code, output, errors = await healthy.tailrace("status", "--json", PORT="1")
    assert (code, errors) == (1, "")
    told = json.loads(output)
    assert told["ready"] is False
    assert told["reasons"][0].startswith("no listener answers on 127.0.0.1:1")
    assert told["handlers"] == {}


async def test_proven_delivery_and_the_way_to_the_log(healthy: Patients) -> None:
    _, findings = await healthy.check(WORKER_DELIVERY="proven")
    (found,) = [finding for finding in findings if finding["name"] == "delivery"]
    assert found["state"] == "ok"
    assert "proven" in found["detail"]
    assert "streamed: DATABASE_URL allows a replication connection" in found["detail"]


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
        plain = await healthy.check(**wanted | {"WORKER_DELIVERY": "auto"})
    finally:
        await healthy.sql("drop owned by app", "drop role app")
    (problem,) = [finding for finding in found if finding["name"] == "delivery"]
    assert problem["detail"] == 'WORKER_DELIVERY=proven: the user "app" may not replicate'
    assert 'alter role "app" replication' in problem["remedy"]
    assert code == 2
    assert 'alter role "app" replication' in errors
    assert "hunter2" not in errors + json.dumps(found)
    assert plain[0] == 0, plain[1]
    (chosen,) = [finding for finding in plain[1] if finding["name"] == "delivery"]
    assert chosen["detail"].startswith("plain (WORKER_DELIVERY=auto, and proven delivery cannot be had: ")
    assert 'alter role "app" replication' in chosen["detail"]


async def test_a_slot_that_is_not_ours(healthy: Patients) -> None:
    await healthy.sql("select pg_create_physical_replication_slot('foreign_one')")
    try:
        found = await healthy.problems(WORKER_DELIVERY="proven", WORKER_SLOT="foreign_one")
        _, auto = await healthy.check(WORKER_DELIVERY="auto", WORKER_SLOT="foreign_one")
    finally:
        await healthy.sql("select pg_drop_replication_slot('foreign_one')")
    (problem,) = [finding for finding in found if finding["name"] == "delivery"]
    assert "uses the plugin of physical replication, not pgoutput" in problem["detail"]
    assert "WORKER_SLOT" in problem["detail"]
    (chosen,) = [finding for finding in auto if finding["name"] == "delivery"]
    assert chosen["detail"].startswith("plain (WORKER_DELIVERY=auto, and proven delivery cannot be had: ")
    assert "foreign_one" in chosen["detail"]


async def test_what_a_slot_keeps(healthy: Patients) -> None:
    await healthy.sql("select pg_create_logical_replication_slot('kept', 'pgoutput')")
    try:
        code, findings = await healthy.check(WORKER_DELIVERY="proven", WORKER_SLOT="kept")
    finally:
        await healthy.sql("select pg_drop_replication_slot('kept')")
    assert code == 0, findings
    (slot,) = [finding for finding in findings if finding["name"] == "slot"]
    assert slot["detail"].startswith('"kept" keeps ')
