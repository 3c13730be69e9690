"""`/metrics` over a real socket, read by the parsers of Prometheus and OpenMetrics."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from starlette.applications import Starlette

from tests.unit.test_telemetry import LEADS, state
from worker.telemetry import METRICS, Meters, Sample, of_listener, of_worker
from worker.web import metrics_route, serve


class Process:
    """Tells numbers, and counts how often it was asked."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.asked = 0
        self.trouble: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def tell(self) -> Sequence[Sample]:
        self.asked += 1
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        return self.samples


@asynccontextmanager
async def scraped(process: Process, **options: float) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(routes=[metrics_route(process.tell, **options)])
    async with (
        serve(app, "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        yield client


def everything() -> list[Sample]:
    meters = Meters(["totals", 'a "quoted"\n\\ name'])
    meters.passed("totals", 12, 0.2, 0.5)
    meters.outcome("totals", 12, 2, {"ValueError": 3})
    worker = of_worker(ready=True, meters=meters, lanes={"totals": 4})
    shared = {"tailrace_ready"}
    return [*of_listener(LEADS, state()), *(one for one in worker if one.name not in shared)]


async def test_prometheus_reads_every_metric_with_its_help_and_kind() -> None:
    async with scraped(Process(everything())) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in prometheus(answer.text)}
    for metric in METRICS.values():
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert all(set(one.labels) - {"le"} == set(metric.labels) for one in family.samples), metric.name
    assert len(families) == len(METRICS)
    handlers = {one.labels["handler"] for one in families["tailrace_pass_changes"].samples}
    assert handlers == {"totals", 'a "quoted"\n\\ name'}


async def test_openmetrics_is_spoken_where_it_is_asked_for() -> None:
    async with scraped(Process(everything())) as client:
        answer = await client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    found = {one.name: one.value for family in openmetrics(answer.text) for one in family.samples}
    assert found["tailrace_realtime_missed_total"] == 7


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_has_nothing_to_say() -> None:
    async with scraped(Process(everything())) as client:
        answer = await client.get("/metrics")
    done = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=answer.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_many_who_ask_at_once_cost_one_question() -> None:
    process = Process(everything())
    process.gate.clear()
    async with scraped(process) as client:
        asking = [asyncio.create_task(client.get("/metrics"), name=f"test: scrape {n}") for n in range(5)]
        while process.asked == 0:
            await asyncio.sleep(0)
        process.gate.set()
        answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert process.asked == 1


async def test_numbers_are_kept_for_a_moment_and_no_longer() -> None:
    kept, fresh = Process(everything()), Process(everything())
    async with scraped(kept, fresh_seconds=3_600) as client:
        await client.get("/metrics")
        await client.get("/metrics")
    async with scraped(fresh, fresh_seconds=0) as client:
        await client.get("/metrics")
        await client.get("/metrics")
    assert (kept.asked, fresh.asked) == (1, 2)


async def test_a_process_that_cannot_tell_answers_503_without_its_secrets() -> None:
    process = Process([])
    process.trouble = RuntimeError("password=hunter2 is in this text")
    async with scraped(process) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 503
    assert "RuntimeError" in answer.text
    assert "hunter2" not in answer.text


async def test_a_process_that_hangs_is_answered_for_in_time() -> None:
    process = Process([])
    process.gate.clear()
    async with scraped(process, answer_seconds=0.05) as client:
        answer = await client.get("/metrics")
        assert (answer.status_code, "no answer within 0.05 s" in answer.text) == (503, True)
        process.gate.set()
        assert (await client.get("/metrics")).status_code == 200
