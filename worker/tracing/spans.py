"""The spans of a change. The only module that knows OpenTelemetry.

    public.orders INSERT     listener, from the commit of the change until its entries stand in Redis
      read                     until the listener had it: the log, or Realtime's frame
      write to lanes           until its entries stand in Redis
      wait in lane           worker, for each handler
      handle NAME              the call; of several changes each has one, and they link to each other
      commit                   of the worker's transaction, in which the position moves

Names, positions and classes of errors are told, never a value or the text of an error.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final, Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from worker.following import Fates
from worker.raw import Position, RawChange
from worker.tracing import Choice, Ids

_NS: Final = 1_000_000_000


class Pass(Protocol):
    """What is told of a pass over a lane; see draining/passes.py."""

    fates: Fates | None
    arrived: dict[Position, float]
    began: int
    commits: int


_given: ContextVar[Ids | None] = ContextVar("ids of the span that is started", default=None)


class _GivenIds(RandomIdGenerator):  # type: ignore[misc] # an extra: without it, it has no types
    """Gives the first span of a change the ids that follow from its position."""

    def generate_trace_id(self) -> int:
        given = _given.get()
        return super().generate_trace_id() if given is None else given.trace

    def generate_span_id(self) -> int:
        given = _given.get()
        return super().generate_span_id() if given is None else given.span


class _Chosen(Sampler):  # type: ignore[misc] # as above
    """Takes the first span of a change, and no other that has no parent: a handler's libraries begin none."""

    def should_sample(self, *_: Any, **__: Any) -> SamplingResult:  # noqa: ANN401 - of no interest
        wanted = _given.get() is not None
        return SamplingResult(Decision.RECORD_AND_SAMPLE if wanted else Decision.DROP)

    def get_description(self) -> str:
        return "chosen by position"


def provider_of(service: str) -> TracerProvider:
    """Make a provider that nobody listens to yet; `OTEL_RESOURCE_ATTRIBUTES` and the like are heeded."""
    resource = Resource.create({"service.name": service})
    return TracerProvider(
        sampler=ParentBased(_Chosen()), resource=resource, id_generator=_GivenIds(), shutdown_on_exit=False
    )


def exporting(endpoint: str | None, service: str) -> TracerProvider:
    """Make a provider that sends to a collector; libraries in handlers have it, too, if they have none."""
    provider = provider_of(service)
    exporter = OTLPSpanExporter(endpoint=None if endpoint is None else f"{endpoint}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(provider)
    return provider


class Traces:
    """Makes the spans of one process."""

    def __init__(self, provider: TracerProvider, choice: Choice) -> None:
        self._tracer = provider.get_tracer("tailrace")
        self._choice = choice

    def wants(self, position: Position) -> bool:
        """Tell whether a change is traced."""
        return self._choice.takes(position)

    def trace_id(self, position: Position) -> str | None:
        """Name the trace of a change, for a line of the log."""
        ids = self._choice.ids(position)
        return None if ids is None else f"{ids.trace:032x}"

    # Listener

    def written(self, position: Position, raw: RawChange, at: float) -> None:
        """Tell of a change whose entries stand in Redis now.

        Args:
            position: of the change; one that is traced.
            raw: the change.
            at: when the listener had it, in seconds since 1970.
        """
        ids = self._choice.ids(position)
        if ids is None:
            return
        now, had = time.time_ns(), int(at * _NS)
        # By two clocks: a change is not read before it has committed.
        committed = min(_nanoseconds(raw.commit_timestamp), had) if raw.commit_timestamp else had
        table = f"{raw.schema}.{raw.table}"
        told = {
            "tailrace.position": str(position),
            "tailrace.source": raw.source,
            "db.collection.name": table,
            "db.operation.name": raw.type,
        }
        known = _given.set(ids)
        try:
            # In a context of its own: whatever span is current here, this one has no parent.
            root = self._tracer.start_span(
                f"{table} {raw.type}", Context(), SpanKind.PRODUCER, told, start_time=committed
            )
        finally:
            _given.reset(known)
        for name, start, end in (("read", committed, had), ("write to lanes", had, now)):
            self._tracer.start_span(name, trace.set_span_in_context(root), start_time=start).end(end)
        root.end(now)

    # Worker

    @contextmanager
    def handling(self, handler: str, positions: Sequence[Position], items: int) -> Iterator[None]:
        """Be the span of a call, if one of its changes is traced; spans of the handler are within it.

        Args:
            handler: which is called.
            positions: of the changes that it is called for.
            items: keys, or changes, that it is given.
        """
        found = [ids for position in positions if (ids := self._choice.ids(position)) is not None]
        if not found:
            yield
            return
        links = [Link(_context(ids)) for ids in found[1:]]
        told = {"tailrace.handler": handler, "tailrace.items": items}
        name, began = f"handle {handler}", time.time_ns()
        span = self._tracer.start_span(name, _within(found[0]), SpanKind.CONSUMER, told, links, began)
        status = Status(StatusCode.UNSET)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        except BaseException as error:
            # Its text may quote a row.
            status = Status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            ended = time.time_ns()
            for one in (span, *(self._like(span, name, told, ids, began) for ids in found[1:])):
                one.set_status(status)
                one.end(ended)

    def _like(self, span: Span, name: str, told: dict[str, Any], ids: Ids, began: int) -> Span:
        """Begin what stands for the same call in the trace of another change."""
        links = [Link(span.get_span_context())]
        return self._tracer.start_span(name, _within(ids), SpanKind.CONSUMER, told, links, began)

    def passed(self, handler: str, progress: Pass) -> None:
        """Tell what became of changes in a pass, after its commit."""
        now = time.time_ns()
        for position, fate in progress.fates or ():
            ids = self._choice.ids(position)
            if ids is None:
                continue
            told = {"tailrace.handler": handler, "tailrace.fate": fate}
            spans = [("commit", progress.commits, now)]
            if (at := progress.arrived.get(position)) is not None:
                spans.append(("wait in lane", min(int(at * _NS), progress.began), progress.began))
            for name, start, end in spans:
                self._tracer.start_span(name, _within(ids), attributes=told, start_time=start).end(end)


def _context(ids: Ids) -> SpanContext:
    return SpanContext(ids.trace, ids.span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _within(ids: Ids) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(_context(ids)), Context())


def _nanoseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1_000_000) * 1_000
