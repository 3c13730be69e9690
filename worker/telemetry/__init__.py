"""What the processes tell in numbers: which metrics there are, and what they are counted and made from.

Pure: nothing here does I/O or knows Prometheus. How numbers become an answer over HTTP is in web/metrics.py.
"""

from worker.telemetry.meters import Meters
from worker.telemetry.names import METRICS, Histogram, Metric, Sample, metrics_table
from worker.telemetry.snapshot import ListenerFacts, of_listener, of_worker, own_version

__all__ = [
    "METRICS",
    "Histogram",
    "ListenerFacts",
    "Meters",
    "Metric",
    "Sample",
    "metrics_table",
    "of_listener",
    "of_worker",
    "own_version",
]
