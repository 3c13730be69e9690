"""`/metrics` of a process, as Prometheus and OpenMetrics read it; what the numbers mean is in telemetry/.

Asked by several, it asks the process once: an answer is kept for a moment. One always comes, in bounded time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from worker.telemetry import METRICS, Histogram, Sample
from worker.web.kept import Kept

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = structlog.get_logger(__name__)

FRESH_SECONDS = 1.0
_ANSWER_SECONDS = 5.0

Tell = Callable[[], Awaitable[Sequence[Sample]]]


def metrics_route(
    tell: Tell, *, answer_seconds: float = _ANSWER_SECONDS, fresh_seconds: float = FRESH_SECONDS
) -> Route:
    """Return the route.

    Args:
        tell: asks the process for its numbers.
        answer_seconds: after so long without them the answer is 503.
        fresh_seconds: for so long an answer is kept.
    """
    kept = Kept(tell, fresh_seconds)

    async def metrics(request: Request) -> Response:
        try:
            async with asyncio.timeout(answer_seconds):
                told = await kept.get()
        except TimeoutError:
            return PlainTextResponse(f"no answer within {answer_seconds:g} s: see the log\n", 503)
        except Exception as error:  # a scrape must be answered whatever is broken
            name = type(error).__name__
            log.warning("the state could not be told", error=name, exc_info=True)
            return PlainTextResponse(f"the state could not be told ({name}): see the log\n", 503)
        return _answer(told, request.headers.get("accept", ""))

    return Route("/metrics", metrics)


def _answer(samples: Iterable[Sample], accept: str) -> Response:
    # Only who is asked for metrics needs them: the import costs others nothing.
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - as above
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415 - as above
    from prometheus_client.registry import Collector  # noqa: PLC0415 - as above

    class Told(Collector):
        def collect(self) -> Iterable["Metric"]:
            return _families(samples)

    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Told())
    # The content type names a charset or an escaping itself.
    return Response(encode(registry), headers={"Content-Type": content_type, "Cache-Control": "no-store"})


def _families(samples: Iterable[Sample]) -> Iterable["Metric"]:
    """Put samples together by metric, in the order of the table."""
    from prometheus_client import core  # noqa: PLC0415 - as above

    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for metric in METRICS.values():
        found = by_name.pop(metric.name, [])
        if not found:
            continue
        family: core.GaugeMetricFamily | core.CounterMetricFamily | core.HistogramMetricFamily
        if metric.kind == "histogram":
            family = core.HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        elif metric.kind == "counter":
            family = core.CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        else:
            family = core.GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for _, value, labels in found:
            if isinstance(value, Histogram):
                family.add_metric(labels, buckets=value.buckets, sum_value=value.sum)  # type: ignore[call-arg] # a histogram's
            else:
                family.add_metric(labels, float(value))  # type: ignore[arg-type, call-arg] # not a histogram's
        yield family
    if by_name:
        raise RuntimeError(f"there is no metric {', '.join(sorted(by_name))}")
