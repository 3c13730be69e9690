"""Scale: how the rate of a drain changes with the backlog, tables, handlers, lanes, width of rows, and keys.

Cases that are compared take turns. Their backlogs were read from the log; the workers are two, except where
lanes are varied: there each lane may want a database connection.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from benchmarks.backlog import INSERT, Backlog, open_redis
from benchmarks.contenders import FAILURES, Contender, interleave, tell
from benchmarks.report import Report
from benchmarks.stack import ORDERS, Stack, stack
from benchmarks.workloads import TABLES
from benchmarks.workloads.many import HANDLERS_VARIABLE, TABLES_VARIABLE, table
from examples.demo.processes import DemoError

TITLE = "rates of drains over backlogs, tables, handlers, lanes, widths of rows, and keys"
GROUPS: Final = {"keys": 1.0, "tables": 1.5, "handlers": 2.0, "backlog": 4.0, "rows": 1.5, "lanes": 2.0}
"""What they take of the time. Those with goals come first."""
BACKLOGS: Final = (10_000, 100_000, 1_000_000)
_PARTS: Final = 5
_SECONDS: Final = 300.0
_FILL_SECONDS: Final = 300.0
_UNLIMITED: Final = {
    "WORKER_DELIVERY": "proven",
    "WORKER_MAX_BACKLOG": "100000000",
    "WORKER_LANE_BACKLOG": "100000000",
    "WORKER_MAX_BACKLOG_BYTES": "16GiB",
}
# An order whose status is so wide, and differs so that Postgres has little to compress.
_WIDE = (
    "insert into orders (customer_id, status, amount) select 1 + n % 200,"
    " (select string_agg(md5(n::text || i::text), '') from generate_series(1, {pieces}) i), 12.50"
    " from generate_series($1::int, $2::int) n"
)
_MD5 = 32
_ONE_KEY = (
    "insert into orders (customer_id, status, amount)"
    " select 1, 'new', 12.50 from generate_series($1::int, $2::int) n"
)
_MANY_KEYS = (
    "insert into orders (customer_id, status, amount)"
    " select 1 + n, 'new', 12.50 from generate_series($1::int, $2::int) n"
)
_SHARE = (
    "i{number} as (insert into {table} (customer_id, status, amount)"
    " select 1 + n % 200, 'new', (n % 50000) / 100.0 from generate_series($1::int, $2::int) n"
    " where n % {tables} = {number})"
)
_MORE_ORDERS = """
create table public.{name} (like public.orders including defaults including indexes);
alter table public.{name} alter id set default nextval('more_orders');
alter table public.{name} replica identity full;
alter publication supabase_realtime add table public.{name};
grant select on public.{name} to service_role;
"""


@dataclass(frozen=True)
class Case:
    """One drain.

    Attributes:
        title: in the report.
        changes: of the backlog.
        module: the workload.
        insert: what writes the rows.
        tables: how many there are; the rows are spread over them.
        handlers: how many get each change.
        workers: how many there are.
        settings: of the daemon.
        at_once: rows that one commit has.
        in_parts: it is drained once, and its rounds are parts of that.
    """

    title: str
    changes: int
    module: str = "batch"
    insert: str = INSERT
    tables: int = 1
    handlers: int = 1
    workers: int = 2
    settings: dict[str, str] = field(default_factory=dict)
    at_once: int = 500
    in_parts: bool = False

    @property
    def name(self) -> str:
        """The result's."""
        return f"scale: {self.title}"


def cases(group: str, changes: int, largest: int) -> list[Case]:
    """Return those of a group that are compared with each other.

    Args:
        group: one of `GROUPS`.
        changes: of their backlogs, where that is not what is varied.
        largest: the largest backlog.
    """
    if group == "backlog":
        sizes = [size for size in BACKLOGS if size <= largest]
        return [
            Case(f"backlog of {size:,}", size, at_once=max(500, size // 200), in_parts=size > 500_000)
            for size in sizes
        ]
    if group == "tables":
        return [
            Case(f"{tables} table{'s' if tables > 1 else ''}", changes, "many", _spread(tables), tables)
            for tables in (1, 20, 200)
        ]
    if group == "handlers":
        return [
            Case(f"{count} handler{'s' if count > 1 else ''}", changes // 5, "many", handlers=count)
            for count in (1, 10, 50)
        ]
    if group == "lanes":
        return [
            Case(
                f"{lanes} lane{'s' if lanes > 1 else ''}",
                changes,
                workers=1,
                settings={"WORKER_LANES": str(lanes)},
            )
            for lanes in (1, 4, 16, 64, 256)
        ]
    if group == "rows":
        widths = {"100 B": (100, 1), "1 kB": (1_000, 1), "100 kB": (100_000, 20)}
        return [
            Case(
                f"rows of {name}",
                max(500, changes // part),
                insert=_WIDE.format(pieces=max(1, width // _MD5)),
                at_once=100,
            )
            for name, (width, part) in widths.items()
        ]
    return [
        Case("distinct keys", changes, "keys", _MANY_KEYS),
        Case("hot key", changes, "keys", _ONE_KEY),
    ]


def _spread(tables: int) -> str:
    """Write so that each row goes to the next table: a commit has rows of many."""
    inserts = [_SHARE.format(number=number, table=table(number), tables=tables) for number in range(tables)]
    return f"with {', '.join(inserts)} select"


async def measure(
    report: Report,
    *,
    changes: int,
    largest: int,
    rounds: int,
    only: Sequence[str] | None,
    until: float = math.inf,
) -> None:
    """Measure each group, and add the figures to the report; what fails is named there.

    Args:
        report: gets the figures.
        changes: of a backlog, where that is not what is varied.
        largest: the largest backlog.
        rounds: how often each case is measured.
        only: names of groups; None: all.
        until: when no further round and no further group is begun, by the monotonic clock.
    """
    chosen = [group for group in GROUPS if only is None or group in only]
    for at, group in enumerate(chosen):
        if (left := until - time.monotonic()) < 0:
            report.fail(f"scale: {group}", DemoError("there was no time left for it"))
            continue
        share = GROUPS[group] / sum(GROUPS[one] for one in chosen[at:])
        mine = time.monotonic() + left * share
        async with AsyncExitStack() as opened:
            made = await asyncio.gather(
                *(_made(report, opened, case) for case in cases(group, changes, largest))
            )
            drains = [one for one in made if one is not None]
            contenders = [
                Contender(one.case.name, one.drain, seconds=_SECONDS)
                for one in drains
                if not one.case.in_parts
            ]
            await interleave(report, contenders, rounds, "changes/s", until=mine)
            for one in drains:
                if one.case.in_parts:
                    await _in_parts(report, one)
                report.remember(one.running.memory)
        if group == "handlers":
            _costs(report, [one.case for one in drains])
    report.note(f"scale: backlogs of {changes} changes where the size is not varied, {rounds} rounds")


async def _made(report: Report, opened: AsyncExitStack, case: Case) -> "_Drain | None":
    """Start the servers of a case, and fill its backlog."""
    settings = _UNLIMITED | case.settings
    settings |= {TABLES_VARIABLE: str(case.tables), HANDLERS_VARIABLE: str(case.handlers)}
    try:
        async with AsyncExitStack() as opening:
            running = await opening.enter_async_context(
                stack(f"benchmarks.workloads.{case.module}", ORDERS + _more(case.tables) + TABLES, settings)
            )
            redis = open_redis(running.redis_url)
            opening.push_async_callback(redis.aclose)
            backlog = Backlog(running, redis, "derived_orders")
            await backlog.fill(
                case.changes,
                insert=case.insert,
                each=case.handlers,
                at_once=case.at_once,
                seconds=_FILL_SECONDS,
            )
            await running.end(running.standin)
            opened.push_async_exit(opening.pop_all())
    except FAILURES as error:
        report.fail(case.name, error)
        tell(f"{case.name}: failed: {error}")
        return None
    tell(f"{case.name}: {backlog.entries:,} entries wait")
    return _Drain(case, running, backlog)


def _more(tables: int) -> str:
    if tables == 1:
        return ""
    more = "".join(_MORE_ORDERS.format(name=table(number)) for number in range(1, tables))
    return f"create sequence more_orders start 1000000000;{more}"


class _Drain:
    """A backlog and those who drain it."""

    def __init__(self, case: Case, running: Stack, backlog: Backlog) -> None:
        self.case = case
        self.running = running
        self._backlog = backlog

    async def drain(self) -> float:
        """Drain it once; returns changes a second, each counted once for each handler that gets it."""
        return await self._backlog.drained(self.case.workers, seconds=_SECONDS)

    async def looks(self) -> list[tuple[float, int]]:
        """Drain it once; returns times with how much was applied until then."""
        return await self._backlog.watched(self.case.workers, seconds=_SECONDS)


async def _in_parts(report: Report, one: _Drain) -> None:
    try:
        looks = await one.looks()
    except FAILURES as error:
        report.fail(one.case.name, error)
        tell(f"{one.case.name}: failed: {error}")
        return
    (_, first), (_, last) = looks[0], looks[-1]
    marks = [first + (last - first) * part / _PARTS for part in range(_PARTS + 1)]
    cut = [next(look for look in looks if look[1] >= mark) for mark in marks]
    rates = [
        (applied - before) / (at - began) for (began, before), (at, applied) in pairwise(cut) if at > began
    ]
    tell(f"{one.case.name}: {(last - first) / (looks[-1][0] - looks[0][0]):,.0f} changes/s")
    report.add(one.case.name, "changes/s", rates)


def _costs(report: Report, made: Iterable[Case]) -> None:
    """Add what a change costs with so many handlers, each of which gets it."""
    for case in made:
        found = next((one for one in report.results if one.case == case.name), None)
        if found is not None:
            costs = [1e6 * case.handlers / rate for rate in found.rounds]
            report.add(f"scale: cost with {case.title}", "µs a change", costs)
