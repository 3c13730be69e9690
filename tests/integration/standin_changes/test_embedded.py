"""The embedded servers: they start anywhere, keep what they hold, and never outlive their owner."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis.asyncio import Redis

from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from standin.embedded.process import free_port

OWNER = """
import asyncio, json, sys
from standin.embedded import EmbeddedPostgres, EmbeddedRedis

async def main():
    postgres, redis = EmbeddedPostgres(sys.argv[1] + "/pg"), EmbeddedRedis(sys.argv[1] + "/redis")
    await postgres.start()
    await redis.start()
    print(json.dumps([postgres.pid, redis.pid]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_postgres_keeps_port_and_data_over_every_kind_of_end(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path) as server:
        port = server.port
        await _run(server.dsn(), "create table t (id int)")
        await server.restart()
        await _run(server.dsn(), "insert into t values (1)")
        await server.restart(immediate=True)
        await _run(server.dsn(), "insert into t values (2)")
        await server.kill()
        assert server.pid is None
        await server.start()
        connection = await asyncpg.connect(server.dsn())
        assert [row[0] for row in await connection.fetch("select id from t order by id")] == [1, 2]
        assert await connection.fetchval("show wal_level") == "logical"
        await connection.close()
        assert server.port == port
    assert server.pid is None


async def test_postgres_asks_for_the_password(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.dsn(password="wrong"))


async def test_taken_port_is_refused_when_it_was_asked_for(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path / "first") as first:
        with pytest.raises(RuntimeError, match="did not start"):
            await EmbeddedPostgres(tmp_path / "second", port=first.port).start()
    async with EmbeddedRedis(tmp_path / "third") as third:
        with pytest.raises(RuntimeError, match="did not start"):
            await EmbeddedRedis(tmp_path / "fourth", port=third.port).start()


async def test_servers_started_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    servers = [EmbeddedPostgres(tmp_path / str(number)) for number in range(3)]
    await asyncio.gather(*(server.start() for server in servers))
    assert len({server.port for server in servers}) == len(servers)
    await asyncio.gather(*(server.stop() for server in servers))


async def test_bootstrap_gives_what_a_project_has_and_may_be_repeated(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path) as server:
        await asyncio.gather(*(bootstrap_supabase(server.dsn()) for _ in range(2)))
        connection = await asyncpg.connect(server.dsn())
        await connection.execute("create table t (id int primary key)")
        for role in ("anon", "authenticated", "service_role"):
            async with connection.transaction():
                await connection.execute(
                    f"set local role {role};"
                    """select set_config('request.jwt.claims', '{"role": "x", "sub": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}', true)"""  # noqa: E501 - one literal
                )
                row = await connection.fetchrow("select auth.role(), auth.uid()::text, count(*) from t")
                assert tuple(row) == ("x", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", 0)
        assert await connection.fetchval("select rolbypassrls from pg_roles where rolname = 'service_role'")
        assert await connection.fetchval("select auth.uid() is null")
        assert await connection.fetchval("select pubname from pg_publication") == "supabase_realtime"
        await connection.close()


async def test_redis_never_evicts_and_comes_back_empty_unless_persistent(tmp_path: Path) -> None:
    for persistent in (False, True):
        async with EmbeddedRedis(tmp_path / str(persistent), persistent=persistent) as server:
            client = Redis.from_url(server.url)
            assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
            await client.set("key", "value")
            await server.restart()
            assert bool(await client.exists("key")) is persistent
            await client.aclose()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("victim", ["owner", "keepers"])
async def test_no_server_outlives_its_owner(tmp_path: Path, victim: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    pids = json.loads(await owner.stdout.readline())
    servers = [psutil.Process(pid) for pid in pids]
    family = [*servers, *(child for server in servers for child in server.children(recursive=True))]
    if victim == "owner":
        owner.kill()
    elif sys.platform == "linux":
        for server in servers:
            os.kill(server.ppid(), signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=30)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    if owner.returncode is None:
        owner.kill()
    await owner.wait()
    assert not left


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root runs it as another user"
)
async def test_postgres_starts_below_directories_that_others_cannot_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    async with EmbeddedPostgres(closed / "deep" / "data") as server:
        await _run(server.dsn(), "select 1")
    assert closed.stat().st_mode & 0o777 == 0o700
    assert closed.stat().st_uid == 0


def test_free_port_is_free() -> None:
    assert 1024 < free_port() < 65536


async def _run(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()
