"""Both processes send the spans of a change to one collector, and they are one trace."""

import asyncio
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.e2e import shop as handlers
from tests.stack import ROOT, Servers, project
from worker.errors import ConfigurationError
from worker.tracing import traces_of

service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
    reason="requirements.lock has changed: make setup",
)


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        taken: list[tuple[str, Any]] = []
        self.taken = taken

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for sent in service.ExportTraceServiceRequest.FromString(body).resource_spans:
                    attributes = {one.key: one.value.string_value for one in sent.resource.attributes}
                    for scope in sent.scope_spans:
                        taken.extend((attributes["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


async def test_a_change_is_one_trace_over_both_processes(shared: Servers, collector: Collector) -> None:
    settings = {"WORKER_TRACES": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as shop:
        listener, worker = await asyncio.gather(shop.listener(), shop.worker())
        await shop.db.execute("insert into orders (customer_id) values (1), (2)")
        await shop.until("select count(*) from derived_log", 2)
        await shop.until(handlers.DIFFERENCES, 0)
        # What is not sent yet is sent at the end.
        assert [await listener.terminate(), await worker.terminate()] == [0, 0]
    # At info no line is about a single change.
    assert [line for line in listener.lines + worker.lines if "position" in line] == []
    traces: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for name, span in collector.taken:
        traces[span.trace_id].append((name, span.name))
    by_worker = ["commit", "commit", "handle log", "handle totals", "wait in lane", "wait in lane"]
    expected = [("tailrace-listener", name) for name in ("public.orders INSERT", "read", "write to lanes")]
    expected += [("tailrace-worker", name) for name in by_worker]
    assert [sorted(spans) for spans in traces.values()] == [expected, expected]
    roots = {span.trace_id: span.span_id for _, span in collector.taken if not span.parent_span_id}
    assert {span.parent_span_id for _, span in collector.taken} == {b"", *roots.values()}


async def test_a_collector_that_is_away_delays_nothing(shared: Servers) -> None:
    settings = {"WORKER_TRACES": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as shop:
        listener, worker = await asyncio.gather(shop.listener(), shop.worker())
        await shop.db.execute("insert into orders (customer_id) values (1)")
        await shop.until("select count(*) from derived_log", 1)
        assert [await listener.terminate(), await worker.terminate()] == [0, 0]


async def test_without_the_extra_it_is_said(shared: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    async with project(shared, handlers.TABLES, "tests.e2e.shop", WORKER_TRACES="0.5") as shop:
        monkeypatch.delitem(sys.modules, "worker.tracing.spans", raising=False)
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        with pytest.raises(ConfigurationError, match=r"needs OpenTelemetry: pip install"):
            async with traces_of(shop.settings, "listener"):
                pass


def test_off_nothing_of_it_is_loaded() -> None:
    code = "import sys, worker.runtime, worker.jobs; print([m for m in sys.modules if 'opentelemetry' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
