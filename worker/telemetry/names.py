"""Every metric by its name, which is stable: dashboards and alerts of other people stand on it.

A name that is not here cannot be told. What is renamed or removed belongs into the changelog.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Teller = Literal["listener", "worker", "both"]


class Metric(NamedTuple):
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    teller: Teller
    """Which process tells it."""
    help: str


class Histogram(NamedTuple):
    """Observations by size, as Prometheus has them."""

    buckets: tuple[tuple[str, int], ...]
    """Upper bound, and how many are at most as large; the last bound is `+Inf`."""
    sum: float


class Sample(NamedTuple):
    """One number, or one histogram, of a metric."""

    name: str
    value: float | Histogram
    labels: tuple[str, ...] = ()
    """Values, in the order of the metric's labels."""


_HANDLER = ("handler",)
_FAILING = ("handler", "error_class", "status")
_SOURCE = ("source",)

_ALL: Final = (
    # Of both processes
    Metric("tailrace_info", "gauge", ("process", "version"), "both", "1; its labels say what runs here."),
    Metric("tailrace_ready", "gauge", (), "both", "1 while /readyz answers 200, else 0."),
    # Of the listener, wherever it stands
    Metric("tailrace_leader", "gauge", (), "listener", "1 while this listener has the lease, 0 on stand-by."),
    Metric(
        "tailrace_state_readable",
        "gauge",
        (),
        "listener",
        "1 while the active listener can read the state in Postgres; at 0 what follows is left out.",
    ),
    Metric(
        "tailrace_rereads_total",
        "counter",
        (),
        "listener",
        "How often the log was read again from the slot, by this process.",
    ),
    # Of the listener that has the lease: changes
    Metric(
        "tailrace_changes_read_total",
        "counter",
        _HANDLER,
        "listener",
        "Changes that concerned the handler and have left its lanes or were filtered out.",
    ),
    Metric("tailrace_changes_filtered_total", "counter", _HANDLER, "listener", "Changes left out by filter."),
    Metric("tailrace_changes_applied_total", "counter", _HANDLER, "listener", "Changes applied."),
    Metric(
        "tailrace_changes_held",
        "gauge",
        _HANDLER,
        "listener",
        "Changes that wait for a retry, or behind one.",
    ),
    Metric("tailrace_changes_parked", "gauge", _HANDLER, "listener", "Changes parked in Postgres."),
    Metric("tailrace_changes_dead", "gauge", _HANDLER, "listener", "Dead letters."),
    Metric(
        "tailrace_failing_changes",
        "gauge",
        _FAILING,
        "listener",
        "Changes that have failed and are held, or are dead letters, by the class of the last error.",
    ),
    Metric("tailrace_failing_attempts", "gauge", _FAILING, "listener", "Attempts that these have used up."),
    Metric(
        "tailrace_failing_oldest_seconds", "gauge", _FAILING, "listener", "How long the oldest of them waits."
    ),
    Metric("tailrace_changes_queued", "gauge", _HANDLER, "listener", "Changes in Redis, not applied yet."),
    Metric(
        "tailrace_handler_lag_seconds",
        "gauge",
        _HANDLER,
        "listener",
        "Age of the oldest change that waits in Redis, or is parked; 0 where none does.",
    ),
    Metric(
        "tailrace_handler_lag_bytes",
        "gauge",
        _HANDLER,
        "listener",
        "Bytes that are queued and not applied yet, payloads that are kept in Postgres included.",
    ),
    Metric(
        "tailrace_payloads",
        "gauge",
        _HANDLER,
        "listener",
        "Changes too large for Redis: their payloads are kept in Postgres until they are applied.",
    ),
    Metric("tailrace_payloads_bytes", "gauge", _HANDLER, "listener", "Bytes of these payloads."),
    Metric("tailrace_handler_paused", "gauge", _HANDLER, "listener", "1 while the handler is paused."),
    Metric("tailrace_handler_orphaned", "gauge", _HANDLER, "listener", "1 while the handler is not loaded."),
    Metric("tailrace_backlog_entries", "gauge", (), "listener", "Entries in Redis, of all handlers."),
    Metric("tailrace_backlog_bytes", "gauge", (), "listener", "Their bytes."),
    Metric(
        "tailrace_backlog_limit_entries",
        "gauge",
        (),
        "listener",
        "WORKER_MAX_BACKLOG: at so many entries reading stops.",
    ),
    Metric(
        "tailrace_backlog_limit_bytes",
        "gauge",
        (),
        "listener",
        "WORKER_MAX_BACKLOG_BYTES: at so many bytes reading stops.",
    ),
    # ... sources
    Metric(
        "tailrace_canary_lag_seconds",
        "gauge",
        _SOURCE,
        "listener",
        "How long the last canary took to come back, by the log (wal) and by Realtime (realtime).",
    ),
    Metric(
        "tailrace_canary_age_seconds",
        "gauge",
        _SOURCE,
        "listener",
        "Time since the last canary that came back was written.",
    ),
    Metric(
        "tailrace_source_lag_bytes",
        "gauge",
        _SOURCE,
        "listener",
        "Log that is on the server's disk and not yet in the lanes.",
    ),
    Metric("tailrace_realtime_connected", "gauge", (), "listener", "1 while the socket to Realtime is open."),
    Metric("tailrace_realtime_subscribed", "gauge", (), "listener", "1 while Realtime serves every table."),
    Metric(
        "tailrace_realtime_connections_total",
        "counter",
        (),
        "listener",
        "Connections to Realtime that were opened by this process, the first one included.",
    ),
    Metric(
        "tailrace_realtime_missed_total",
        "counter",
        (),
        "listener",
        "Changes in the log that Realtime did not send; nothing was lost by it.",
    ),
    Metric(
        "tailrace_realtime_extra_total",
        "counter",
        (),
        "listener",
        "Changes that Realtime sent and the log does not have, or once more.",
    ),
    Metric(
        "tailrace_slot_retained_bytes", "gauge", (), "listener", "Log that the server keeps for the slot."
    ),
    Metric(
        "tailrace_slot_safe_bytes",
        "gauge",
        (),
        "listener",
        "Log that may still be written before the slot is in danger; left out where nothing limits it.",
    ),
    Metric(
        "tailrace_slot_wal_status",
        "gauge",
        ("wal_status",),
        "listener",
        "1 for what pg_replication_slots says of the slot, 0 for all else it could say.",
    ),
    # ... what a person may have to do something about
    Metric("tailrace_gaps_open", "gauge", (), "listener", "Gaps that nobody has closed."),
    Metric("tailrace_backfills", "gauge", ("state",), "listener", "Backfills that wait or run."),
    Metric("tailrace_workers", "gauge", (), "listener", "Workers that live."),
    # Of each worker
    Metric(
        "tailrace_pass_changes",
        "histogram",
        _HANDLER,
        "worker",
        "Changes that one pass over a lane has taken; passes with nothing to do are left out.",
    ),
    Metric(
        "tailrace_pass_duration_seconds",
        "histogram",
        _HANDLER,
        "worker",
        "Time of such a pass, from its transaction's beginning to after its commit.",
    ),
    Metric(
        "tailrace_pass_lag_seconds",
        "histogram",
        _HANDLER,
        "worker",
        "For each such pass, time from the listener's reading its newest change to after its commit.",
    ),
    Metric(
        "tailrace_worker_applied_total", "counter", _HANDLER, "worker", "Changes applied by this process."
    ),
    Metric(
        "tailrace_worker_retries_total",
        "counter",
        _HANDLER,
        "worker",
        "Calls for held changes by this process, whatever came of them.",
    ),
    Metric(
        "tailrace_worker_failures_total",
        "counter",
        ("handler", "error_class"),
        "worker",
        "Changes, or keys, for which the handler failed in this process.",
    ),
    Metric("tailrace_worker_lanes", "gauge", _HANDLER, "worker", "Lanes that this process drains now."),
)

METRICS: Final[Mapping[str, Metric]] = {metric.name: metric for metric in _ALL}


def metrics_table() -> str:
    """Write the table of docs/operations.md."""
    lines = ["| metric | kind | labels | told by | means |", "|---|---|---|---|---|"]
    for one in _ALL:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        teller = "both" if one.teller == "both" else f"the {one.teller}"
        lines.append(f"| `{one.name}` | {one.kind} | {labels} | {teller} | {one.help} |")
    return "\n".join(lines)
