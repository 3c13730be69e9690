"""Examines Redis: reachable, new enough, alone, and not throwing away what lies in the lanes."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from config.settings import Settings
from worker.check.findings import Finding

_SECONDS = 5
_OLDEST = (6, 2)


async def examine_redis(settings: Settings) -> list[Finding]:
    """Return what is to be said of Redis."""
    try:
        client = Redis.from_url(
            settings.redis_url.get_secret_value(), socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS
        )
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
    return _judge(told, settings)


def _judge(told: dict[str, Any], settings: Settings) -> list[Finding]:
    version = str(told.get("redis_version", "0"))
    findings = [Finding("redis", "ok", f"Redis {version}")]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        findings = [Finding("redis", "problem", f"Redis {version} is too old", "use Redis 6.2 or newer")]
    if told.get("redis_mode") == "cluster":
        remedy = "use a Redis without cluster mode: arq and the lanes need all keys in one place"
        findings.append(Finding("redis", "problem", "Redis runs as a cluster", remedy))
    policy, most = told.get("maxmemory_policy"), int(told.get("maxmemory", 0))
    if policy not in (None, "noeviction"):
        detail = (
            f"eviction policy {policy} throws lanes away when memory is short, and they must be read again"
        )
        remedy = "run: redis-cli config set maxmemory-policy noeviction (hosted: in the provider's settings)"
        # Without a limit nothing is evicted, but a hosted Redis may get one any day.
        findings.append(Finding("redis", "problem" if most else "warning", detail, remedy))
    if most and most < settings.max_backlog_bytes:
        detail = (
            f"maxmemory is {most} bytes, less than WORKER_MAX_BACKLOG_BYTES ({settings.max_backlog_bytes})"
        )
        findings.append(
            Finding("redis", "warning", detail, "set WORKER_MAX_BACKLOG_BYTES well below maxmemory")
        )
    return findings
