"""Examines Redis: reachable, new enough, alone, writable, and not throwing away what lies in the lanes.

And arq's queue in it: whether it is ours, and whether somebody works on it. What arq itself is told is fixed
in `worker.jobs`; a person can only give the queue a name that is somebody else's.
"""

import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from config.settings import Settings
from worker.check.findings import Finding, Fix, size
from worker.delivery import Wanted
from worker.lanes import Lanes
from worker.queue import connection_pool, decode_job

_OLDEST = (6, 2)
_FULL = 0.8
_JOBS = 20
_KEYS = 1_000
_STALE_SECONDS = 10.0
"""A job that nobody has taken for so long is not just being taken."""
_NOEVICTION = "config set maxmemory-policy noeviction"


async def examine_redis(settings: Settings) -> list[Finding]:
    """Return what is to be said of Redis."""
    try:
        client = _client(settings)
    except ValueError:
        return [Finding("redis", "problem", "REDIS_URL cannot be used", "write redis://host:6379/0")]
    async with client:
        try:
            await client.ping()
        except (AuthenticationError, ResponseError):
            detail = "Redis refuses the user or password, or wants one"
            return [
                Finding("redis", "problem", detail, "correct REDIS_URL: redis://[user]:password@host:6379/0")
            ]
        except (RedisError, OSError) as error:
            detail = f"Redis cannot be reached ({type(error).__name__})"
            return [Finding("redis", "problem", detail, "start Redis, or correct REDIS_URL")]
        try:
            told = await client.info()
        except (RedisError, OSError) as error:
            detail = f"Redis answers, but does not tell about itself ({type(error).__name__})"
            return [
                Finding(
                    "redis", "warning", detail, "see that its version is 6.2 or newer, its policy noeviction"
                )
            ]
        try:
            findings = _judge(told, settings, alone=await _is_alone(client, told, settings.queue))
            return findings + await _examine_queue(client, settings.queue)
        except (RedisError, OSError) as error:
            detail = f"Redis does not let us look at our keys ({type(error).__name__})"
            remedy = f"allow the user of REDIS_URL all commands on keys {settings.queue}:* and arq:*"
            return [Finding("redis", "problem", detail, remedy)]


async def run_redis(settings: Settings, words: str) -> None:
    """Run a command that a finding has named.

    Raises:
        redis.exceptions.RedisError, OSError: it failed.
    """
    async with _client(settings) as client:
        await client.execute_command(*words.split())  # type: ignore[no-untyped-call] # redis-py has none here


def _client(settings: Settings) -> Redis:
    client: Redis = Redis.from_pool(connection_pool(settings.redis_url.get_secret_value(), retries=0))
    return client


async def _is_alone(client: Redis, told: dict[str, Any], queue: str) -> bool:
    """Tell whether all that this Redis holds is ours: then nobody else minds how it evicts."""
    if sum(1 for name in told if name.startswith("db") and name[2:].isdigit()) > 1:
        return False
    name = queue.encode()
    # arq keeps jobs of all queues under the same names; the queue of another one is no key of ours.
    ours = (name + b":", b"arq:job:", b"arq:in-progress:", b"arq:retry:")
    looked = 0
    async for key in client.scan_iter(count=_KEYS):
        looked += 1
        if not (key == name or key.startswith(ours)) or looked > _KEYS:
            return False
    return True


def _judge(told: dict[str, Any], settings: Settings, *, alone: bool) -> list[Finding]:
    version = str(told.get("redis_version", "0"))
    findings = [Finding("redis", "ok", f"Redis {version}, {size(int(told.get('used_memory', 0)))} in use")]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        findings = [Finding("redis", "problem", f"Redis {version} is too old", "use Redis 6.2 or newer")]
    if told.get("redis_mode") == "cluster":
        remedy = "use a Redis without cluster mode: arq and the lanes need all keys in one place"
        findings.append(Finding("redis", "problem", "Redis runs as a cluster", remedy))
    if told.get("role") == "slave":
        remedy = "put the address of its primary into REDIS_URL"
        findings.append(Finding("redis", "problem", "this Redis is a replica, and takes no writes", remedy))
    if _has_failed(told):
        detail = "Redis could not save its data, and may refuse writes until it can (MISCONF)"
        remedy = "look at its log: mostly its disk is full, or memory is too short for the fork"
        findings.append(Finding("redis", "problem", detail, remedy))
    findings += _judge_memory(told, settings, alone=alone)
    return findings + _judge_keeping(told, settings.delivery)


def _has_failed(told: dict[str, Any]) -> bool:
    # "ok" as long as nothing was ever saved, too.
    states = (told.get("rdb_last_bgsave_status", "ok"), told.get("aof_last_write_status", "ok"))
    return any(state != "ok" for state in states)


def _judge_memory(told: dict[str, Any], settings: Settings, *, alone: bool) -> list[Finding]:
    findings = []
    policy, most = told.get("maxmemory_policy"), int(told.get("maxmemory", 0))
    used, machine = int(told.get("used_memory", 0)), int(told.get("total_system_memory", 0))
    if policy not in (None, "noeviction"):
        detail = (
            f"eviction policy {policy} throws lanes away when memory is short, and they must be read again"
        )
        remedy = (
            f"run: redis-cli {_NOEVICTION} (hosted: in the provider's settings), and put it into its file"
        )
        # Without a limit nothing is evicted, but a hosted Redis may get one any day. Others who keep their
        # things here may want them evicted: then it is not for a program to decide.
        fixes = (Fix("redis", _NOEVICTION),) if alone else ()
        findings.append(Finding("redis", "problem" if most else "warning", detail, remedy, fixes))
    if most and used > _FULL * most:
        detail = f"{size(used)} of maxmemory {size(most)} are in use: writes are refused when it is full"
        remedy = "raise maxmemory, lower WORKER_MAX_BACKLOG_BYTES, or move other users of this Redis"
        findings.append(Finding("redis", "warning", detail, remedy))
    if most and most < settings.max_backlog_bytes:
        detail = (
            f"maxmemory is {most} bytes, less than WORKER_MAX_BACKLOG_BYTES ({settings.max_backlog_bytes})"
        )
        findings.append(
            Finding("redis", "warning", detail, "set WORKER_MAX_BACKLOG_BYTES well below maxmemory")
        )
    if not most and machine and machine < 2 * settings.max_backlog_bytes:
        detail = (
            f"its machine has {size(machine)}, and WORKER_MAX_BACKLOG_BYTES is {settings.max_backlog_bytes}"
        )
        remedy = "set WORKER_MAX_BACKLOG_BYTES below half of that, and maxmemory for the rest"
        findings.append(Finding("redis", "warning", detail, remedy))
    return findings


def _judge_keeping(told: dict[str, Any], delivery: Wanted) -> list[Finding]:
    """In plain delivery nobody can be asked again for what was in the lanes."""
    if delivery not in ("plain", "webhooks") or int(told.get("aof_enabled", 0)):
        return []
    detail = "it writes no append-only file: a restart of Redis is a gap in plain delivery"
    remedy = "run: redis-cli config set appendonly yes (hosted: in the provider's settings)"
    return [Finding("redis", "note", detail, remedy)]


async def _examine_queue(client: Redis, queue: str) -> list[Finding]:
    """Look at arq's queue."""
    other = "set WORKER_QUEUE to a name that nobody else uses"
    kind = (await client.type(queue)).decode()
    if kind not in ("none", "zset"):
        return [Finding("arq", "problem", f"the key {queue} in Redis is no queue but a {kind}", other)]
    jobs = await client.zrange(queue, 0, _JOBS - 1, withscores=True) if kind == "zset" else []
    for id_, _ in jobs:
        body = await client.get(b"arq:job:" + id_)
        if body is not None and not _is_ours(body):
            detail = f"the queue {queue} holds jobs of somebody else, and our workers take them"
            return [Finding("arq", "problem", detail, other)]
    workers = await Lanes(client, queue).workers()
    waits = max((time.time() - due / 1000 for _, due in jobs), default=0.0)
    if not workers and waits > _STALE_SECONDS:
        detail = f"jobs have waited in {queue} for {waits:.0f} s, and no worker lives"
        remedy = "start a worker: arq worker.jobs.WorkerSettings (with the same REDIS_URL and WORKER_QUEUE)"
        return [Finding("arq", "warning", detail, remedy)]
    living = {0: "no worker lives now", 1: "one worker lives"}.get(
        len(workers), f"{len(workers)} workers live"
    )
    return [Finding("arq", "ok", f"queue {queue}: {living}")]


def _is_ours(body: bytes) -> bool:
    try:
        return decode_job(body).get("f") == "drain"
    except (ValueError, AttributeError):
        return False
