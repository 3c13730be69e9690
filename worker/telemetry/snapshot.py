"""Numbers from a process's state, at the moment at which somebody asks for them.

What all listeners would tell alike, because it stands in Postgres, is told by the one that has the lease: a
sum over processes must not count it twice.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

from worker.telemetry.meters import Meters
from worker.telemetry.names import Sample

WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")
BACKFILLS: Final = ("waiting", "running")


@functools.cache
def own_version() -> str:
    """Tell which version runs here."""
    try:
        return version("tailrace")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


class ListenerFacts(NamedTuple):
    """What a listener knows of itself."""

    ready: bool
    leads: bool
    rereads: int = 0
    connections: int = 0
    """To Realtime, since the process began."""
    limits: tuple[int, int] = (0, 0)
    """Of the backlog: entries, bytes."""


def of_listener(facts: ListenerFacts, state: Mapping[str, Any] | None) -> list[Sample]:
    """Tell a listener's numbers.

    Args:
        facts: what it knows of itself.
        state: as `/status` has it, with all counters as they are noted in Postgres; None where it cannot be
            read, or this listener stands by.
    """
    samples = [
        Sample("tailrace_info", 1, ("listener", own_version())),
        Sample("tailrace_ready", facts.ready),
        Sample("tailrace_leader", facts.leads),
        Sample("tailrace_rereads_total", facts.rereads),
        Sample("tailrace_realtime_connections_total", facts.connections),
    ]
    if facts.leads:
        samples.append(Sample("tailrace_state_readable", state is not None))
    if state is None:
        return samples
    for name, handler in state["handlers"].items():
        samples += _handler(name, handler)
    for one in state["failures"]:
        labels = (one["handler"], one["error_class"], one["status"])
        samples += [
            Sample("tailrace_failing_changes", one["changes"], labels),
            Sample("tailrace_failing_attempts", one["attempts"], labels),
            Sample("tailrace_failing_oldest_seconds", one["oldest_seconds"], labels),
        ]
    samples += [
        Sample("tailrace_backlog_limit_entries", facts.limits[0]),
        Sample("tailrace_backlog_limit_bytes", facts.limits[1]),
        Sample("tailrace_gaps_open", state["counts"]["gaps_open"]),
        *(Sample("tailrace_backfills", state["counts"][f"backfills_{one}"], (one,)) for one in BACKFILLS),
    ]
    if (backlog := state["counts"]["backlog"]) is not None:  # Redis is not away
        samples += [
            Sample("tailrace_backlog_entries", backlog["entries"]),
            Sample("tailrace_backlog_bytes", backlog["bytes"]),
            Sample("tailrace_workers", len(state["workers"])),
        ]
    samples += _sources(state["realtime"], state["slot"])
    return samples


def _handler(name: str, handler: Mapping[str, Any]) -> Iterator[Sample]:
    labels = (name,)
    queued = handler["queued"]
    # Without what is queued: lanes that are filled anew would take the counter back.
    yield Sample("tailrace_changes_read_total", handler["read"] - (queued or 0), labels)
    yield Sample("tailrace_changes_filtered_total", handler["filtered"], labels)
    yield Sample("tailrace_changes_applied_total", handler["applied"], labels)
    for status in ("held", "parked", "dead"):
        yield Sample(f"tailrace_changes_{status}", handler[status], labels)
    if queued is not None:
        yield Sample("tailrace_changes_queued", queued, labels)
        yield Sample("tailrace_handler_lag_seconds", handler["lag_seconds"], labels)
        yield Sample("tailrace_handler_lag_bytes", handler["queued_bytes"], labels)
    yield Sample("tailrace_payloads", handler["payloads"], labels)
    yield Sample("tailrace_payloads_bytes", handler["payload_bytes"], labels)
    yield Sample("tailrace_handler_paused", bool(handler["paused"]), labels)
    yield Sample("tailrace_handler_orphaned", handler["state"] == "orphaned", labels)


def _sources(realtime: Mapping[str, Any], slot: Mapping[str, Any] | None) -> Iterator[Sample]:
    yield from _known("tailrace_canary_lag_seconds", realtime["lag_seconds"], "realtime")
    yield from _known("tailrace_canary_age_seconds", realtime["canary_seconds"], "realtime")
    yield Sample("tailrace_realtime_connected", bool(realtime["connected"]))
    yield Sample("tailrace_realtime_subscribed", bool(realtime["subscribed"]))
    yield from _known("tailrace_realtime_missed_total", realtime["missed"])
    yield from _known("tailrace_realtime_extra_total", realtime["extra"])
    if slot is None:
        return
    yield from _known("tailrace_canary_lag_seconds", slot["lag_seconds"], "wal")
    yield from _known("tailrace_source_lag_bytes", slot["lag_bytes"], "wal")
    yield Sample("tailrace_slot_retained_bytes", slot["retained_bytes"])
    yield from _known("tailrace_slot_safe_bytes", slot["safe_bytes"])
    for status in WAL_STATUSES:
        yield Sample("tailrace_slot_wal_status", slot["wal_status"] == status, (status,))


def _known(name: str, value: float | None, *labels: str) -> Sequence[Sample]:
    """Leave out what nobody knows: nought would be a claim."""
    return [] if value is None else [Sample(name, value, labels)]


def of_worker(*, ready: bool, meters: Meters, lanes: Mapping[str, int]) -> list[Sample]:
    """Tell a worker's numbers; `lanes` is how many it drains now, for each of its handlers."""
    return [
        Sample("tailrace_info", 1, ("worker", own_version())),
        Sample("tailrace_ready", ready),
        *meters.samples(),
        *(Sample("tailrace_worker_lanes", count, (handler,)) for handler, count in lanes.items()),
    ]
