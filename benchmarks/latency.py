"""Latency: from a commit, or in plain delivery its websocket frame, to the commit of what is derived from it.

The handlers are the worked examples, `handlers/`: one change handler, one derive handler. Each change is an
insert for a customer of its own, so that each has derived rows of its own and no batch covers up for another.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final, Literal

import orjson

from benchmarks.report import Report, quantiles
from benchmarks.stack import ORDERS, PYTHON, Stack, stack
from examples.demo.database import connect
from examples.demo.processes import Child, DemoError

TITLE = "time from commit or websocket frame to the derived row, at a steady rate"
Source = Literal["plain", "stream", "windows"]
GOALS: Final[dict[Source, tuple[str, dict[str, float]]]] = {
    "plain": ("frame to derived row", {"p50": 10.0, "p99": 50.0}),
    "stream": ("commit to derived row", {"p50": 5.0, "p99": 25.0}),
    "windows": ("commit to derived row", {"p50": 40.0}),
}
"""What is measured against a goal, and the milliseconds of each quantile."""
_WARM_UP_SECONDS = 4.0
_SETTLE_SECONDS = 60.0

_INSERT = "insert into public.orders (customer_id, status, amount) values ($1, 'new', 12.50)"
_DERIVED = "select least((select count(*) from order_status_log), (select count(*) from customer_totals))"
# The commit time of a row is that of the transaction that made it, in microseconds since 1970.
_COMMITS = """
select o.id,
       (extract(epoch from pg_xact_commit_timestamp(o.xmin)) * 1000000)::bigint,
       (extract(epoch from pg_xact_commit_timestamp(l.xmin)) * 1000000)::bigint,
       (extract(epoch from pg_xact_commit_timestamp(t.xmin)) * 1000000)::bigint
from orders o join order_status_log l on l.order_id = o.id join customer_totals t using (customer_id)
where o.customer_id > $1 and o.customer_id <= $2
"""

CHANGE, DERIVE = "change handler", "derive handler"


class Writer:
    """Inserts single rows at a steady rate, each for a new customer."""

    def __init__(self, url: str, rate: float) -> None:
        self._url = url
        self._rate = rate
        self.written = 0

    async def write(self, seconds: float) -> tuple[int, int]:
        """Write for so long; returns the customers written for: above the first, up to the second."""
        before, began = self.written, time.monotonic()
        db = await connect(self._url)
        try:
            for number in range(int(seconds * self._rate)):
                await asyncio.sleep(max(0.0, began + number / self._rate - time.monotonic()))
                self.written += 1
                await db.execute(_INSERT, self.written)
        finally:
            await db.close()
        return before, self.written


async def measure(
    report: Report, *, source: Source, rate: float, seconds: float, rounds: int, poll_interval: float
) -> None:
    """Run all rounds on one stack, and add their figures to the report.

    Raises:
        DemoError: a process ended, or a derived row did not come.
    """
    delivery = {"WORKER_DELIVERY": "plain" if source == "plain" else "proven"}
    async with stack("handlers", ORDERS, delivery, poll_interval=poll_interval) as running:
        if source == "windows":
            await running.read_in_windows()
        children: tuple[Child, ...] = (await running.listener(), await running.worker())
        watcher = await _watcher(running) if source == "plain" else None
        children += (watcher,) if watcher is not None else ()
        writer = Writer(running.database_url, rate)
        await _round(running, writer, _WARM_UP_SECONDS, children)
        spans = []
        for number in range(rounds):
            spans.append(await _round(running, writer, seconds, children))
            print(
                f"round {number + 1} of {rounds}: {spans[-1][1] - spans[-1][0]} changes written and derived"
            )
        arrived: dict[str, int] | None = None
        if watcher is not None:
            await watcher.end()
            arrived = orjson.loads((running.folder / "frames.json").read_bytes())
        series = [await _latencies(running, arrived, span) for span in spans]
    _add(report, source, series)
    wanted = rate * seconds
    late = [1 - (last - first) / wanted for first, last in spans]
    report.notes.append(
        f"{source}: {rate:g} changes/s, {rounds} rounds of {seconds:g} s ({wanted:.0f} changes each, worst"
        f" round {max(late):.1%} short); the stand-in looks at its slot every {poll_interval * 1000:g} ms"
    )


async def _watcher(running: Stack) -> Child:
    command = [*PYTHON, "benchmarks.watching", "--url", running.realtime_url]
    command += ["--key", running.service_role_key, "--table", "orders"]
    command += ["--out", str(running.folder / "frames.json")]
    child = await running.children.start("watcher", command)
    await child.said(lambda line: line if line.get("event") == "system" else None)
    return child


async def _round(
    running: Stack, writer: Writer, seconds: float, children: tuple[Child, ...]
) -> tuple[int, int]:
    span = await writer.write(seconds)
    await running.until(_DERIVED, writer.written, seconds=_SETTLE_SECONDS, children=children)
    return span


async def _latencies(
    running: Stack, arrived: dict[str, int] | None, span: tuple[int, int]
) -> dict[str, list[float]]:
    """Return the milliseconds of each step of each change of a round."""
    rows = await running.db.fetch(_COMMITS, *span)
    if len(rows) != span[1] - span[0]:
        raise DemoError(f"{span[1] - span[0]} changes have {len(rows)} derived rows")
    found: dict[str, list[float]] = {}
    for id_, committed, logged, totalled in rows:
        steps = {
            f"commit to derived row, {CHANGE}": logged - committed,
            f"commit to derived row, {DERIVE}": totalled - committed,
        }
        if arrived is not None:
            frame = arrived[str(id_)] / 1000
            steps |= {
                f"frame to derived row, {CHANGE}": logged - frame,
                f"frame to derived row, {DERIVE}": totalled - frame,
                "commit to frame": frame - committed,
            }
        for name, microseconds in steps.items():
            found.setdefault(name, []).append(microseconds / 1000)
    return found


def _add(report: Report, source: Source, series: Sequence[dict[str, list[float]]]) -> None:
    step, goals = GOALS[source]
    worst = dict[str, float]()
    for name in series[0]:
        by_round = [quantiles(one[name]) for one in series]
        for quantile in by_round[0]:
            result = report.add(f"{name}, {quantile}", "ms", [one[quantile] for one in by_round])
            if name.startswith(step):
                worst[quantile] = max(worst.get(quantile, 0.0), result.value)
    for quantile, goal in goals.items():
        report.below(f"{step}, slower handler, {quantile}", worst[quantile], goal, "ms")
