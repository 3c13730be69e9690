"""The table of metrics, and the numbers that are made from a process's state."""

import re
from typing import Any

import pytest

from worker.telemetry import METRICS, Histogram, ListenerFacts, Meters, Sample, of_listener
from worker.telemetry.meters import MOST_CLASSES, OTHER

LEADS = ListenerFacts(ready=True, leads=True, rereads=2, connections=3, limits=(1_000, 10_000))


def handler(**counts: Any) -> dict[str, Any]:
    known = {
        "state": "active",
        "kind": "derive",
        "tables": ["public.orders"],
        "read": 100,
        "filtered": 10,
        "applied": 60,
        "held": 4,
        "parked": 5,
        "dead": 1,
        "queued": 20,
        "queued_bytes": 2_000,
        "payloads": 1,
        "payload_bytes": 70_000_000,
        "lanes": {"count": 2, "queued": [20, 0], "holding": [0, 9]},
        "lag_seconds": 1.5,
        "paused": False,
    }
    return known | counts


def state(**parts: Any) -> dict[str, Any]:
    known = {
        "handlers": {"totals": handler()},
        "realtime": {
            "connected": True,
            "subscribed": False,
            "missed": 7,
            "extra": 0,
            "lag_seconds": 0.2,
            "canary_seconds": 3.0,
        },
        "slot": {
            "wal_status": "extended",
            "retained_bytes": 4096,
            "safe_bytes": 8192,
            "lag_seconds": 0.1,
            "lag_bytes": 512,
        },
        "failures": [
            {
                "handler": "totals",
                "error_class": "ValueError",
                "status": "held",
                "changes": 4,
                "attempts": 9,
                "oldest_seconds": 61.5,
            }
        ],
        "workers": ["one", "two"],
        "counts": {
            "gaps_open": 2,
            "backfills_waiting": 1,
            "backfills_running": 0,
            "backlog": {"entries": 20, "bytes": 2_000},
        },
    }
    return known | parts


def told(samples: list[Sample]) -> dict[tuple[str, ...], float | Histogram]:
    found = {(one.name, *one.labels): one.value for one in samples}
    assert len(found) == len(samples), "a number is told twice"
    return found


def test_names_are_of_the_form_that_is_promised() -> None:
    for metric in METRICS.values():
        assert re.fullmatch(r"tailrace_[a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not re.search(r"_(ms|millis\w*|kb|kib|mb|mib|minutes)(_|$)", metric.name)
        assert metric.help.endswith("."), metric.name
        assert "le" not in metric.labels


def test_a_listener_tells_each_of_its_metrics() -> None:
    names = {sample.name for sample in of_listener(LEADS, state())}
    assert names == {name for name, metric in METRICS.items() if metric.teller != "worker"}


def test_a_worker_tells_its_metrics_and_no_others() -> None:
    meters = Meters(["totals"])
    meters.outcome("totals", 1, 1, {"ValueError": 1})
    names = {sample.name for sample in meters.samples()}
    own = {name for name, metric in METRICS.items() if metric.teller == "worker"}
    assert names == own - {"tailrace_worker_lanes"}


def test_labels_are_those_of_the_table() -> None:
    meters = Meters(["totals"])
    meters.outcome("totals", 1, 1, {"ValueError": 1})
    for sample in [*of_listener(LEADS, state()), *meters.samples()]:
        assert len(sample.labels) == len(METRICS[sample.name].labels), sample.name


def test_what_fails_is_told_by_the_class_of_its_error() -> None:
    found = told(of_listener(LEADS, state()))
    of_class = ("totals", "ValueError", "held")
    assert found["tailrace_failing_changes", *of_class] == 4
    assert found["tailrace_failing_attempts", *of_class] == 9
    assert found["tailrace_failing_oldest_seconds", *of_class] == 61.5


def test_what_is_queued_is_not_among_what_was_read() -> None:
    # Lanes that are filled anew would take a counter back, which looks as if it had begun anew.
    found = told(of_listener(LEADS, state()))
    assert found["tailrace_changes_read_total", "totals"] == 80
    assert found["tailrace_changes_queued", "totals"] == 20
    assert found["tailrace_handler_lag_bytes", "totals"] == 2_000


def test_payloads_that_redis_is_spared_are_counted_beside_those_in_it() -> None:
    found = told(of_listener(LEADS, state()))
    assert found["tailrace_payloads", "totals"] == 1
    assert found["tailrace_payloads_bytes", "totals"] == 70_000_000


def test_of_a_slot_its_status_is_one_of_four() -> None:
    found = told(of_listener(LEADS, state()))
    statuses = {name[1]: value for name, value in found.items() if name[0] == "tailrace_slot_wal_status"}
    assert statuses == {"reserved": 0, "extended": 1, "unreserved": 0, "lost": 0}


def test_a_listener_on_stand_by_tells_nothing_that_the_active_one_tells() -> None:
    names = {sample.name for sample in of_listener(ListenerFacts(ready=False, leads=False), None)}
    assert names == {
        "tailrace_info",
        "tailrace_ready",
        "tailrace_leader",
        "tailrace_rereads_total",
        "tailrace_realtime_connections_total",
    }


def test_while_postgres_is_away_that_is_what_is_told() -> None:
    found = told(of_listener(LEADS, None))
    assert found["tailrace_state_readable",] == 0
    assert found["tailrace_leader",] == 1
    assert not any(name.startswith("tailrace_changes") for name, *_ in found)


def test_while_redis_is_away_nothing_is_said_of_what_is_in_it() -> None:
    away = handler(queued=None, queued_bytes=None)
    counts = state()["counts"] | {"backlog": None}
    found = told(of_listener(LEADS, state(handlers={"totals": away}, workers=[], counts=counts)))
    names = {name for name, *_ in found}
    assert found["tailrace_changes_read_total", "totals"] == 100
    assert names.isdisjoint(
        {
            "tailrace_changes_queued",
            "tailrace_backlog_entries",
            "tailrace_workers",
            "tailrace_handler_lag_bytes",
        }
    )


def test_in_plain_delivery_there_is_no_slot_and_no_comparison() -> None:
    realtime = state()["realtime"] | {"missed": None, "extra": None}
    names = {sample.name for sample in of_listener(LEADS, state(slot=None, realtime=realtime))}
    assert not any("slot" in name or "missed" in name or "extra" in name for name in names)
    assert "tailrace_canary_lag_seconds" in names


def test_observations_are_counted_up_to_each_bound() -> None:
    meters = Meters(["totals"])
    for changes in (1, 2, 500, 6_000):
        meters.passed("totals", changes, 0.005, None)
    found = told(list(meters.samples()))
    changes = found["tailrace_pass_changes", "totals"]
    assert isinstance(changes, Histogram)
    buckets = dict(changes.buckets)
    assert (buckets["1"], buckets["2"], buckets["250"], buckets["500"], buckets["+Inf"]) == (1, 2, 2, 3, 4)
    assert changes.sum == 6_503
    seconds = found["tailrace_pass_duration_seconds", "totals"]
    assert isinstance(seconds, Histogram)
    assert seconds.buckets[0] == ("0.005", 4)
    lag = found["tailrace_pass_lag_seconds", "totals"]
    assert isinstance(lag, Histogram)
    assert lag.buckets[-1] == ("+Inf", 0)


@pytest.mark.parametrize("more", [0, 1, 500])
def test_a_handler_that_makes_up_classes_of_errors_fills_nothing(more: int) -> None:
    meters = Meters(["totals"])
    for number in range(MOST_CLASSES + more):
        meters.outcome("totals", 0, 0, {f"Error{number}": 1})
    meters.outcome("totals", 0, 0, {"Error0": 1})
    found = {
        one.labels[1]: one.value for one in meters.samples() if one.name == "tailrace_worker_failures_total"
    }
    assert len(found) == MOST_CLASSES + (1 if more else 0)
    assert found["Error0"] == 2
    assert found.get(OTHER, 0) == more
