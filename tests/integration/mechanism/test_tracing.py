"""A change is one trace, from its commit to the commit of what was derived from it."""

import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from config.logging import write_log
from tests.integration.mechanism.bench import Bench, item
from worker import Change, Handlers
from worker.tracing import Choice

pytest.importorskip("opentelemetry.sdk", reason="requirements.lock has changed: make setup")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from worker.tracing.spans import Traces, provider_of

WRITE = text("insert into derived_log (handler, id, note) values ('one', :id, :note)")
WAYS = ("commit", "handle one", "read", "wait in lane", "write to lanes")


class Made:
    """Traces, and what was exported."""

    def __init__(self, share: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        provider = provider_of("tailrace-test")
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(provider, Choice(share, "test"))
        self.tracer = provider.get_tracer("a library")

    def by_trace(self) -> dict[int, dict[str, ReadableSpan]]:
        found: dict[int, dict[str, ReadableSpan]] = defaultdict(dict)
        for span in self.exporter.get_finished_spans():
            assert span.context is not None
            assert span.name not in found[span.context.trace_id]
            found[span.context.trace_id][span.name] = span
        return found


@pytest.fixture
def made() -> Iterator[Made]:
    yield Made()
    assert trace.get_current_span() is trace.INVALID_SPAN


def in_order(spans: dict[str, ReadableSpan]) -> None:
    """Check that a trace begins with the commit, and that its parts follow each other under one root."""
    root = spans["public.items INSERT"]
    assert root.parent is None
    assert root.context is not None
    parts = [spans[name] for name in ("read", "write to lanes", "wait in lane", "handle one", "commit")]
    assert {part.parent.span_id for part in parts if part.parent} == {root.context.span_id}
    times = [time for part in parts for time in (part.start_time, part.end_time)]
    assert times[0] == root.start_time
    assert (
        times[1] == times[2] == times[4]
    )  # it waits from when the listener had it, which is in the lane's entry
    del times[4]
    assert None not in times
    del times[3]
    assert times == sorted(times, key=lambda time: time or 0)


async def test_a_change_handler_is_called_within_the_trace_of_each_change(at: Bench, made: Made) -> None:
    on, seen = Handlers(), []

    @on.insert("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession) -> None:
        seen.append(trace.get_current_span().get_span_context().trace_id)
        with made.tracer.start_as_current_span("of a library"):
            await session.execute(WRITE, change.record)

    at.traces = made.traces
    await at.load(on)
    for n in (1, 2, 3):
        await at.put("items", item(n, 5))
    await at.settle(at.drain("one"))
    found = made.by_trace()
    assert list(found) == sorted(found, key=seen.index)
    assert len(found) == 3
    for spans in found.values():
        in_order(spans)
        own, within = spans["handle one"], spans["of a library"]
        assert own.context is not None
        assert within.parent is not None
        assert within.parent.span_id == own.context.span_id
        assert spans["commit"].attributes["tailrace.fate"] == "applied"


@pytest.mark.parametrize("kind", ["derive", "batch"])
async def test_a_call_for_many_is_in_the_trace_of_each(kind: str, at: Bench, made: Made) -> None:
    on = Handlers()
    if kind == "derive":

        @on.derive("items", name="one", by="grp")
        async def keys(keys: list[int], session: AsyncSession) -> None: ...

    else:

        @on.insert("items", name="one", lane_key="grp", batch=10)
        async def changes(changes: list[Change], session: AsyncSession) -> None: ...

    at.traces = made.traces
    await at.load(on)
    for n in range(4):
        at.take("items", item(n, 5))
    await at.journal.flush()
    await at.settle(at.drain("one"))
    found = made.by_trace()
    assert len(found) == 4
    calls = []
    for spans in found.values():
        in_order(spans)
        calls.append(spans["handle one"])
        assert spans["handle one"].attributes["tailrace.items"] == (1 if kind == "derive" else 4)
    # The call itself links to the traces of all others, and those to it.
    assert sorted(len(call.links) for call in calls) == [1, 1, 1, 3]
    (itself,) = (call for call in calls if len(call.links) == 3)
    assert {link.context.trace_id for link in itself.links} | {itself.context.trace_id} == set(found)
    assert {call.links[0].context.span_id for call in calls if call is not itself} == {itself.context.span_id}


async def test_a_failure_is_told_by_its_class_and_by_no_value(at: Bench, made: Made) -> None:
    on = Handlers()

    @on.insert("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession) -> None:
        assert change.record is not None
        raise ValueError(change.record["note"])

    at.traces = made.traces
    await at.load(on)
    await at.put("items", item(1, 5, "the secret note"))
    with structlog.testing.capture_logs() as lines:
        await at.drain("one").run(at.lane_of("one", item(1, 5)))
    spans = made.exporter.get_finished_spans()
    told = [span for span in spans if span.name == "handle one"]
    assert len(told) == 2  # the second time with care
    assert {span.status.description for span in told} == {"ValueError"}
    assert "secret" not in "".join(span.to_json() for span in spans)
    (commit,) = (span for span in spans if span.name == "commit")
    assert commit.attributes["tailrace.fate"] == "held"
    (failed,) = (line for line in lines if line["event"] == "handler failed")
    assert failed["trace_id"] == f"{commit.context.trace_id:032x}"


async def test_only_a_share_is_traced_and_both_sides_choose_the_same(at: Bench) -> None:
    made = Made(0.25)
    on = Handlers()

    @on.insert("items", name="one", lane_key="grp", batch=500)
    async def one(changes: list[Change], session: AsyncSession) -> None:
        with made.tracer.start_as_current_span("without parent", context=trace.Context()):
            pass  # a library must not begin traces of its own

    at.traces = made.traces
    await at.load(on)
    for n in range(200):
        at.take("items", item(n, 5))
    await at.journal.flush()
    await at.settle(at.drain("one"))
    found = made.by_trace()
    assert 20 < len(found) < 90
    assert {tuple(sorted(set(spans) - {"public.items INSERT"})) for spans in found.values()} == {WAYS}


def line_within(span: Any) -> dict[str, Any]:
    """What a line of the log has that is written within a span."""
    root, stream, before = logging.getLogger(), io.StringIO(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    try:
        write_log(stream=stream)
        with trace.use_span(span):
            structlog.get_logger("handlers").info("within")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(capture=False)
        structlog.configure(**before)
    return dict(json.loads(stream.getvalue()))


def test_lines_of_the_log_name_trace_and_span() -> None:
    context = trace.SpanContext(7, 9, is_remote=True, trace_flags=trace.TraceFlags(1))
    line = line_within(trace.NonRecordingSpan(context))
    assert (line["trace_id"], line["span_id"]) == (f"{7:032x}", f"{9:016x}")
    assert "trace_id" not in line_within(trace.INVALID_SPAN)
