"""What the command `backfill` does: asks, looks, cancels, goes on, and shows how far it is."""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from worker.backfilling import Wanted
from worker.cli import printing
from worker.cli.operator import FINE, PROBLEMS, who, with_operations
from worker.cli.progress import bars
from worker.errors import ConfigurationError, Refused
from worker.operating import Operations

LOOK_SECONDS = 0.5
_OPEN = ("waiting", "running")


class Asked(NamedTuple):
    """What was typed."""

    table: str | None
    handler: str | None
    condition: str | None
    rate: int | None
    resume: bool
    cancel: bool
    wait: bool | None
    by: str | None


def backfill(asked: Asked, *, as_json: bool) -> int:
    """Do it; without a table, list what there is."""
    table = asked.table
    if asked.resume and asked.cancel:
        raise ConfigurationError(["--resume and --cancel exclude each other"])
    if table is None and any((asked.handler, asked.condition, asked.rate, asked.resume, asked.cancel)):
        raise ConfigurationError(["name the table: python -m worker backfill TABLE"])
    if (asked.resume and asked.condition is not None) or (asked.cancel and (asked.condition or asked.rate)):
        raise ConfigurationError(["--where belongs to a new backfill; --rate does, or to one that goes on"])

    async def do(operations: Operations) -> int:
        if table is None:
            printing.show_backfills(await operations.backfills(), as_json=as_json)
            return FINE
        if asked.cancel:
            made = await _cancel(operations, table, asked.handler)
        elif asked.resume:
            made = await _resume(operations, table, asked.handler, asked.rate)
        else:
            made = await operations.backfill(
                who(asked.by), table, handler=asked.handler, condition=asked.condition, rate=asked.rate
            )
        watched = sys.stdout.isatty() and not as_json
        if not asked.cancel and (watched if asked.wait is None else asked.wait):
            made = await _follow(operations, [one["id"] for one in made])
        printing.show_backfills(made, as_json=as_json)
        cancelled = not asked.cancel and any(one["state"] == "cancelled" for one in made)
        return PROBLEMS if cancelled else FINE

    return with_operations(do)


async def _meant(operations: Operations, table: str, handler: str | None) -> list[dict[str, Any]]:
    wanted = Wanted.of(table)
    return [
        one
        for one in await operations.backfills()
        if (one["schema"], one["table"]) == (wanted.schema, wanted.table)
        and one["handler"] == (handler or one["handler"])
    ]


async def _cancel(operations: Operations, table: str, handler: str | None) -> list[dict[str, Any]]:
    found = [one for one in await _meant(operations, table, handler) if one["state"] in _OPEN]
    if not found:
        raise Refused(f"no backfill of {table} is waiting or running")
    return [await operations.cancel_backfill(one["id"]) for one in found]


async def _resume(
    operations: Operations, table: str, handler: str | None, rate: int | None
) -> list[dict[str, Any]]:
    """Give what is under way, or else have the newest cancelled one of each handler go on."""
    found = await _meant(operations, table, handler)
    meant = [one for one in found if one["state"] in _OPEN]
    if not meant:
        newest = {one["handler"]: one for one in reversed(found)}
        meant = [one for one in newest.values() if one["state"] == "cancelled"]
    if not meant:
        raise Refused(f"no backfill of {table} is waiting, running or cancelled")
    return [await operations.resume_backfill(one["id"], rate) for one in meant]


async def _follow(operations: Operations, ids: Sequence[int]) -> list[dict[str, Any]]:
    with bars() as progress:
        tasks = {id_: progress.add_task("", total=None, rate="") for id_ in ids}
        began = {one["id"]: (one["rows"], time.monotonic()) for one in await operations.backfills(ids)}
        while True:
            found = await operations.backfills(ids)
            for one in found:
                progress.update(
                    tasks[one["id"]],
                    description=f"{one['handler']} {one['state']}",
                    completed=one["rows"],
                    total=_total(one),
                    rate=_rate(one, *began[one["id"]]),
                )
            if all(one["state"] not in _OPEN for one in found):
                return found
            await asyncio.sleep(LOOK_SECONDS)


def _total(one: Mapping[str, Any]) -> int | None:
    """Give what is expected; statistics may say less than there is."""
    if one["state"] == "done":
        return int(one["rows"])
    return None if one["estimated"] is None else max(one["estimated"], one["rows"])


def _rate(one: Mapping[str, Any], before: int, since: float) -> str:
    seconds = time.monotonic() - since
    return f"{(one['rows'] - before) / seconds:,.0f} rows/s" if seconds > 1 else ""
