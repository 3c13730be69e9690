"""Latency: from a commit, or in plain delivery its websocket frame, to the commit of what is derived from it.

All contenders do the same work, one upsert of one row for each change. What the worked examples take,
`handlers/`, is measured beside that: one change handler and one derive handler of the same table, three
statements in two transactions, through the ORM; their figure is that of the slower one. Each change is an
insert for a customer of its own, so that each has derived rows of its own and no batch covers up for another.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import orjson

from benchmarks.contenders import FAILURES, tell
from benchmarks.pipelines import OURS, Kind, missing, pipeline
from benchmarks.report import Report, quantiles
from benchmarks.stack import ORDERS, PYTHON, Stack, stack
from examples.demo.database import connect
from examples.demo.processes import Child, DemoError

TITLE = "time from commit or websocket frame to the derived row, at a steady rate"
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
Work = Literal["same", "examples"]
WORKS: Final[tuple[Work, ...]] = get_args(Work)
RATES: Final = (1.0, 50.0, 200.0, 1000.0)
_FEWEST: Final = 5
"""Changes of a round at the least, however low the rate."""
_WARM_UP_SECONDS = 4.0
_WARM_UP_RATE = 50.0
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
_COPIED = "select count(*) from derived_orders"
_COPIES = """
select o.id,
       (extract(epoch from pg_xact_commit_timestamp(o.xmin)) * 1000000)::bigint,
       (extract(epoch from pg_xact_commit_timestamp(d.xmin)) * 1000000)::bigint
from orders o join derived_orders d on d.order_id = o.id
where o.customer_id > $1 and o.customer_id <= $2
"""

_FRAME = "commit to frame"
_COPY = ""
HANDLERS = ("change handler", "derive handler")
Span = tuple[int, int]
Steps = Mapping[str, list[float]]
"""Milliseconds of each change of a round, by what they are of."""


class Writer:
    """Inserts single rows at a steady rate, each for a new customer."""

    def __init__(self, url: str, first: int = 0) -> None:
        self._url = url
        self.written = first

    async def write(self, rate: float, seconds: float) -> Span:
        """Write for so long; returns the customers written for: above the first, up to the second."""
        before, began = self.written, time.monotonic()
        db = await connect(self._url)
        try:
            for number in range(max(_FEWEST, int(seconds * rate))):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                self.written += 1
                await db.execute(_INSERT, self.written)
        finally:
            await db.close()
        return before, self.written


@dataclass
class _Subject:
    """What is measured: its processes run, and it tells what came of the writer's changes.

    Attributes:
        url: of the database.
        derived: waits until all changes up to that of a customer are derived.
        steps: reads what each change of a span took.
        finish: what is to be done after the last change and before the reading.
        first: customers up to this one are not the writer's.
    """

    url: str
    derived: Callable[[int], Awaitable[None]]
    steps: Callable[[Span], Awaitable[Steps]]
    finish: Callable[[], Awaitable[None]] | None = None
    first: int = 0
    memory: dict[str, float] = field(default_factory=dict)


async def measure(
    report: Report,
    *,
    kinds: Sequence[Kind],
    rates: Sequence[float],
    seconds: float,
    rounds: int,
    poll_interval: float,
    works: Sequence[Work] = WORKS,
    until: float = math.inf,
) -> None:
    """Measure each kind on servers of its own, its rates in turns, and add the figures to the report.

    What fails is named there.

    Args:
        report: gets the figures.
        kinds: what is measured.
        rates: changes a second.
        seconds: of a round.
        rounds: how often each rate is measured.
        poll_interval: of the stand-in, in seconds.
        works: the same for all, and, for those kinds that are ours, the worked examples.
        until: when no further round is begun, by the monotonic clock.
    """
    for kind in kinds:
        if (why := missing(kind)) is not None:
            report.skip(why)
            continue
        for work in works if kind in OURS else WORKS[:1]:
            case = f"latency: {kind}" if work == "same" else f"latency: {kind}, worked examples"
            made = _copies(kind, poll_interval) if work == "same" else _examples(kind, poll_interval)
            try:
                async with made as subject:
                    spans = await _rounds(case, subject, rates, seconds, rounds, until)
                    if subject.finish is not None:
                        await subject.finish()
                    for rate, of_rate in spans.items():
                        steps = [await subject.steps(one) for one in of_rate]
                        _add(report, f"{case}, {rate:g}/s", steps)
                report.remember(subject.memory)
            except FAILURES as error:
                report.fail(case, error)
                tell(f"{case}: failed: {error}")
    report.note(
        f"latency: {rounds} rounds of {seconds:g} s at each rate, at least {_FEWEST} changes each;"
        f" the stand-in looks at its slot every {poll_interval * 1000:g} ms"
    )


async def _rounds(
    case: str, subject: _Subject, rates: Sequence[float], seconds: float, rounds: int, until: float
) -> dict[float, list[Span]]:
    writer = Writer(subject.url, subject.first)
    await writer.write(_WARM_UP_RATE, _WARM_UP_SECONDS)
    await subject.derived(writer.written)
    spans: dict[float, list[Span]] = {rate: [] for rate in rates}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for rate in rates:
            began = time.monotonic()
            spans[rate].append(await writer.write(rate, seconds))
            took = time.monotonic() - began
            await subject.derived(writer.written)
            first, last = spans[rate][-1]
            tell(
                f"{case}, {rate:g}/s, round {number + 1} of {rounds}:"
                f" {last - first} changes, written at {(last - first) / took:,.0f}/s"
            )
    return spans


@asynccontextmanager
async def _examples(kind: Kind, poll_interval: float) -> AsyncIterator[_Subject]:
    """Ours, with the worked examples for handlers."""
    delivery = {"WORKER_DELIVERY": "plain" if kind == "plain" else "proven"}
    async with stack("handlers", ORDERS, delivery, poll_interval=poll_interval) as running:
        if kind == "windows":
            await running.read_in_windows()
        children: tuple[Child, ...] = (await running.listener(), await running.worker())
        frames = await _Frames.of(running, kind)

        async def derived(upto: int) -> None:
            watched = (*children, *frames.children)
            await running.until(_DERIVED, upto, seconds=_SETTLE_SECONDS, children=watched)

        async def steps(span: Span) -> Steps:
            rows = await running.db.fetch(_COMMITS, *span)
            _complete(rows, span)
            return frames.steps(HANDLERS, rows)

        subject = _Subject(running.database_url, derived, steps, frames.finish)
        yield subject
        await running.end(*children)
        subject.memory.update(running.memory)


class _Frames:
    """When the frame of each row arrived, in plain delivery; nothing else has frames."""

    def __init__(self, running: Stack, watcher: Child | None) -> None:
        self._running = running
        self._watcher = watcher
        self._arrived = dict[str, int]()
        self.children = () if watcher is None else (watcher,)

    @classmethod
    async def of(cls, running: Stack, kind: Kind) -> "_Frames":
        """Begin to watch them, where there are any."""
        return cls(running, await _watcher(running) if kind == "plain" else None)

    async def finish(self) -> None:
        """Take what was watched."""
        if self._watcher is not None:
            await self._watcher.end()
            self._arrived.update(orjson.loads((self._running.folder / "frames.json").read_bytes()))

    def steps(self, handlers: Sequence[str], rows: Sequence[Sequence[int]]) -> Steps:
        """Compute what each change took.

        Args:
            handlers: what to call the time until each of its derived rows.
            rows: id, and microseconds since 1970 of its commit and of those of its derived rows.
        """
        found: dict[str, list[float]] = {}
        for id_, committed, *derived in rows:
            began = self._arrived[str(id_)] / 1000 if self._arrived else committed
            for handler, at in zip(handlers, derived, strict=True):
                found.setdefault(handler, []).append((at - began) / 1000)
            if self._arrived:
                found.setdefault(_FRAME, []).append((began - committed) / 1000)
                found.setdefault("from the commit", []).append((max(derived) - committed) / 1000)
        return found


async def _watcher(running: Stack) -> Child:
    command = [*PYTHON, "benchmarks.watching", "--url", running.realtime_url]
    command += ["--key", running.service_role_key, "--table", "orders"]
    command += ["--out", str(running.folder / "frames.json")]
    child = await running.children.start("watcher", command)
    await child.said(lambda line: line if line.get("event") == "system" else None)
    return child


@asynccontextmanager
async def _copies(kind: Kind, poll_interval: float) -> AsyncIterator[_Subject]:
    """Any kind, with the same work for all."""
    async with pipeline(kind, poll_interval=poll_interval) as made:
        await made.start()
        running = made.running
        frames = await _Frames.of(running, kind)
        await running.db.execute("truncate derived_orders")
        first = 1_000_000  # above the customers that were written before

        async def derived(upto: int) -> None:
            children = (*made.children, *frames.children)
            await running.until(_COPIED, upto - first, seconds=_SETTLE_SECONDS, children=children)

        async def steps(span: Span) -> Steps:
            rows = await running.db.fetch(_COPIES, *span)
            _complete(rows, span)
            return frames.steps([_COPY], rows)

        subject = _Subject(running.database_url, derived, steps, frames.finish, first=first)
        yield subject
        await made.end()
        if kind in OURS:
            subject.memory.update(running.memory)


def _complete(rows: Sequence[object], span: Span) -> None:
    if len(rows) != span[1] - span[0]:
        raise DemoError(f"{span[1] - span[0]} changes have {len(rows)} derived rows")


def _add(report: Report, case: str, rounds: Sequence[Steps]) -> None:
    """Add the quantiles of each step; of handlers, those of the slower one."""
    by_step: dict[str, list[dict[str, float]]] = {}
    for one in rounds:
        of_handlers = [quantiles(values) for step, values in one.items() if step in HANDLERS]
        if of_handlers:
            slower = {name: max(each[name] for each in of_handlers) for name in of_handlers[0]}
            # Where frames were watched, it is what comes on top of them.
            step = ", over the frame, slower handler" if _FRAME in one else ", slower handler"
            by_step.setdefault(step, []).append(slower)
        for step, values in one.items():
            if step == _COPY:
                by_step.setdefault(", over the frame" if _FRAME in one else "", []).append(quantiles(values))
            elif step not in HANDLERS:
                by_step.setdefault(f", {step}", []).append(quantiles(values))
    for step, found in by_step.items():
        for name in found[0]:
            report.add(f"{case}{step}, {name}", "ms", [each[name] for each in found])
