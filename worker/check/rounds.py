"""The order of the examination: what needs nothing first, then the servers at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from config.settings import Settings
from worker.check.clocks import examine_clocks
from worker.check.delivery import examine_delivery
from worker.check.findings import Finding
from worker.check.keys import examine_key, examine_published_keys
from worker.check.postgres import examine_database, examine_poolers
from worker.check.realtime import examine_realtime
from worker.check.redis import examine_redis
from worker.errors import ConfigurationError
from worker.loader import load
from worker.registry import Handler

_SECONDS = 40.0  # one examination at most; Realtime may take 15 s to join and 20 s to subscribe


def settings_findings(unknown: Sequence[str]) -> list[Finding]:
    """Report that the settings could be read, and what only looks like one."""
    return [
        Finding("settings", "ok", "complete and well-formed"),
        *(Finding("settings", "warning", line, "correct or remove it") for line in unknown),
    ]


async def run_checks(
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
    environments: Sequence[Path] = (),
) -> list[Finding]:
    """Examine handlers, keys, servers and clocks. Raises for nothing it finds; ends in time.

    Args:
        settings: where they are.
        progress: is told how many examinations are done, of how many.
        environments: folders of the handlers' own Alembic environments.
    """
    findings, handlers = _load(settings)
    findings += examine_key(settings)
    tables = sorted({(one.schema, one.table) for handler in handlers for one in handler.subscriptions})
    examinations = {
        "jwks": examine_published_keys(settings),
        "delivery": examine_delivery(settings),
        "pooler": examine_poolers(settings),
        "database": examine_database(settings, handlers, environments),
        "redis": examine_redis(settings),
        "realtime": examine_realtime(settings, tables),
        "clocks": examine_clocks(settings),
    }
    done = 0

    async def examined(name: str, examination: Awaitable[list[Finding]]) -> list[Finding]:
        nonlocal done
        found = await _within(name, examination)
        done += 1
        if progress is not None:
            progress(done, len(examinations))
        return found

    answers = await asyncio.gather(*(examined(*one) for one in examinations.items()))
    return findings + [found for answer in answers for found in answer]


def _load(settings: Settings) -> tuple[list[Finding], tuple[Handler, ...]]:
    try:
        handlers = load(settings.handlers)
    except ConfigurationError as error:
        return [Finding("handlers", "problem", problem) for problem in error.problems], ()
    names = ", ".join(handler.name for handler in handlers)
    return [Finding("handlers", "ok", names)], handlers


async def _within(name: str, examination: Awaitable[list[Finding]]) -> list[Finding]:
    """Bound an examination: a doctor that hangs is no help."""
    try:
        async with asyncio.timeout(_SECONDS):
            return await examination
    except TimeoutError:
        return [Finding(name, "problem", f"no answer within {_SECONDS:g} s", "check the network")]
