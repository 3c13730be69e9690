"""Changes that fail among many that do not: what the innocent lose by them, and how fast a redrive is.

One backlog in Redis is drained twice, from exactly the same state: with a handler that is mended from the
beginning (the clean run), and with one that fails at the poison. Rates count the innocent, by the commit
times of what was derived of them, from the first commit to the last, which may be of one that had to wait
behind poison. Then the handler is mended, everything is redriven by the command, and all is counted.
"""

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from benchmarks.backlog import APPLIED, Backlog, open_redis
from benchmarks.report import Report
from benchmarks.stack import ORDERS, PYTHON, Stack, stack
from benchmarks.workloads.poison import POISON, TABLES
from examples.demo.processes import Child, DemoError

TITLE = "changes a second while one in a hundred fails, beside a run in which none does; and the redrive"
KINDS: Final = {
    "single": "change handler, one at a time",
    "batch": "change handler, batch=500",
    "derive": "derive handler",
    "raising": "change handler, batch=500, raises at the first",
    "blind": "change handler, batch=500, the error does not tell",
}
ATTEMPTS: Final = 3
_SETTINGS: Final = {"WORKER_MAX_ATTEMPTS": str(ATTEMPTS), "WORKER_BACKOFF_SECONDS": "0.1"}
_SECONDS: Final = 300.0

_INSERT: Final = """
insert into orders (customer_id, status, amount)
select 1 + n % 500, case when hashint4(n) % {one_in} = 0 then 'poison' else 'new' end, 1
from generate_series($1::int, $2::int) n
"""
_MEND: Final = "insert into derived_mended default values"
_SETTLED: Final = (
    "select (select coalesce(sum(applied), 0)::bigint from tailrace.lanes)"
    " + (select count(*) from tailrace.held where status = 'dead')"
)
_COMMITS: Final = """
select extract(epoch from pg_xact_commit_timestamp(c.xmin))::float8, count(*)
from derived_copies c join orders o on o.id = c.order_id and o.status <> 'poison' group by 1 order by 1
"""
_COPIES: Final = "select order_id, customer_id, again from derived_copies order by seq"


async def measure(
    report: Report, *, changes: int, share: float, rounds: int, only: Sequence[str] | None
) -> None:
    """Measure each kind of handler on a stack of its own, and add the figures to the report.

    Args:
        report: gets the figures.
        changes: backlog of a round.
        share: of them poison.
        rounds: how often each is measured.
        only: of `KINDS`; None: all.

    Raises:
        DemoError: a process ended, or something was lost, doubled, out of order or not as configured.
    """
    one_in = max(1, round(1 / share))
    report.notes.append(
        f"{changes} changes of 500 keys, one in {one_in} of them poison; {ATTEMPTS} attempts, backoff from"
        f" {_SETTINGS['WORKER_BACKOFF_SECONDS']} s; one worker"
    )
    for kind, title in KINDS.items():
        if only and kind not in only:
            continue
        limits = {"WORKER_MAX_BACKLOG": str(changes * 2), "WORKER_MAX_BACKLOG_BYTES": "4GiB"}
        module = f"benchmarks.workloads.poison.{kind}"
        async with stack(module, ORDERS + TABLES, limits | _SETTINGS) as running:
            redis = open_redis(running.redis_url)
            try:
                backlog = Backlog(running, redis, "derived_copies, derived_mended, tailrace.held")
                case = _Case(running, backlog, kind)
                await case.fill(changes, one_in)
                await case.measure(report, title, rounds)
            finally:
                await redis.aclose()
            report.remember(running.memory)


class _Case:
    """One kind of handler with its backlog."""

    def __init__(self, running: Stack, backlog: Backlog, kind: str) -> None:
        self._running = running
        self._backlog = backlog
        self._kind = kind
        self._poison: list[int] = []

    async def fill(self, changes: int, one_in: int) -> None:
        """Write the backlog."""
        await self._backlog.fill(changes, insert=_INSERT.format(one_in=one_in))
        found = await self._running.db.fetch("select id from orders where status = $1 order by id", POISON)
        self._poison = [row[0] for row in found]

    async def measure(self, report: Report, title: str, rounds: int) -> None:
        """Measure the clean run and the other in turn, so that a noisy minute hits both."""
        names = ("clean", "with poison", "redrive, the command", "redrive, until all is applied")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            async with self._let_go(mended=True) as worker:
                rates["clean"].append(await self._drained(worker))
            async with self._let_go(mended=False) as worker:
                rates["with poison"].append(await self._drained(worker))
                await self._check_dead()
                command, applied = await self._redrive(worker)
            rates["redrive, the command"].append(command)
            rates["redrive, until all is applied"].append(applied)
            self._check_copies(await self._running.db.fetch(_COPIES))
            shown = ", ".join(f"{name} {rate[-1]:,.0f} /s" for name, rate in rates.items())
            print(f"{self._kind}, round {number + 1} of {rounds}: {shown}")
        clean = report.add(f"poison: {title}, clean", "changes/s", rates["clean"])
        report.add(f"poison: {title}, with poison", "changes/s", rates["with poison"], floor=clean.value)
        for name in names[2:]:
            report.add(f"poison: {title}, {name}", "dead letters/s", rates[name])

    @asynccontextmanager
    async def _let_go(self, *, mended: bool) -> AsyncIterator[Child]:
        """Start a worker on empty lanes, and let the backlog go."""
        await self._backlog.reset()
        if mended:
            await self._running.db.execute(_MEND)
        (worker,) = await self._running.workers(1)
        try:
            await self._backlog.restore()
            yield worker
        finally:
            await self._running.end(worker)

    async def _drained(self, worker: Child) -> float:
        """Wait until every change is applied or dead; return the rate of the innocent."""
        entries = self._backlog.entries
        await self._running.until(_SETTLED, entries, seconds=_SECONDS, children=(worker,))
        commits = await self._running.db.fetch(_COMMITS)
        rows, innocent = sum(count for _, count in commits), entries - len(self._poison)
        if rows != innocent:
            raise DemoError(f"{innocent} innocent changes have {rows} copies")
        return float((rows - commits[0][1]) / (commits[-1][0] - commits[0][0]))

    async def _redrive(self, worker: Child) -> tuple[float, float]:
        """Mend the handler and redrive all; dead letters a second of the command, and until the last."""
        running, number = self._running, len(self._poison)
        await running.db.execute(_MEND)
        command = [*PYTHON, "worker", "dead-letters", "redrive", "--all", "--json"]
        began = time.monotonic()
        redrive = await running.children.start("redrive", command, running.settings)
        await redrive.succeed()
        said = time.monotonic() - began
        await running.until(APPLIED, self._backlog.entries, seconds=_SECONDS, children=(worker,))
        return number / said, number / (time.monotonic() - began)

    # What must be so

    async def _check_dead(self) -> None:
        """See that all the poison is dead, and nothing else, after as many attempts as are configured."""
        found = await self._running.db.fetch("select attempts, error_class, error, status from tailrace.held")
        dead = {tuple(row) for row in found}
        wanted = {(ATTEMPTS, "benchmarks.workloads.poison.PoisonError", "an order is poison", "dead")}
        if len(found) != len(self._poison) or dead != wanted:
            raise DemoError(f"{len(self._poison)} poison changes have {len(found)} dead letters: {dead}")

    def _check_copies(self, copies: Sequence[Any]) -> None:
        """See that each order was copied once, and each key in order: the innocent, and what was redriven."""
        ids = sorted(row[0] for row in copies)
        if ids != list(range(1, self._backlog.entries + 1)):
            raise DemoError(f"{self._backlog.entries} changes have {len(ids)} copies, {len(set(ids))} orders")
        if self._kind == "derive":  # one change for each key: no order
            return
        poison = set(self._poison)
        last: dict[tuple[int, bool], int] = defaultdict(int)
        for order, customer, again in copies:
            if again != (order in poison):
                raise DemoError(f"order {order} was {'' if again else 'not '}redriven")
            if order < last[customer, again]:
                raise DemoError(f"order {order} of customer {customer} came after {last[customer, again]}")
            last[customer, again] = order
