from typing import Any

import orjson
import pytest

from standin.server import faults, tampering

CHANGE = (
    b'{"table":"t","type":"UPDATE","record":{"n": 12.50, "v": null, "big": "'
    + b"x" * 63
    + b'", "fit": "'
    + b"y" * 62
    + b'"},"columns":[{"name": "n", "type": "numeric"}],"errors":null,"schema":"public",'
    b'"commit_timestamp":"2026-01-02T03:04:05.678Z","old_record":{"n": 1}}'
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop": 2},
        {"drop": True},
        {"drop_next": -1},
        {"drop_next": 1.5},
        {"delay_ms": "500"},
        {"truncate": 1},
        {"silent": "always"},
        {"close": 1005},
        {"close": True},
        {"error_events": 413},
        {"refuse_connections": 418},
        {"system_error": ""},
        {"nonsense": True},
        [],
        None,
    ],
)
def test_wrong_switches_are_refused_with_a_message(wrong: object) -> None:
    with pytest.raises(faults.FaultError) as caught:
        faults.split(wrong)
    named = next(iter(wrong)) if isinstance(wrong, dict) else "object"
    assert named in str(caught.value)


def test_a_request_is_split_into_switches_and_actions() -> None:
    asked = {"drop": 1, "close": 1012, "expire_tokens": False, "half_open": "current"}
    assert faults.split(asked) == ({"drop": 1.0, "half_open": "current"}, {"close": 1012})


def test_switches_are_checked_on_assignment_and_all_or_none_on_update() -> None:
    switches = faults.Faults()
    with pytest.raises(faults.FaultError, match="no switch 'drops'"):
        switches.drops = 1  # type: ignore[attr-defined]
    with pytest.raises(faults.FaultError):
        switches.update({"drop": 0.5, "truncate": "yes"})
    assert switches.drop == 0.0
    switches.drop = 0.5
    assert switches.snapshot()["drop"] == 0.5
    switches.clear()
    assert switches.snapshot() == faults.Faults().snapshot()


def test_a_change_of_switches_is_told_with_their_names() -> None:
    told: list[frozenset[str]] = []
    switches = faults.Faults(told.append)
    switches.silent = "current"
    switches.update({"drop": 0.1, "oversize": True})
    assert told == [{"silent"}, {"drop", "oversize"}]


def test_truncated_changes_keep_only_short_values_and_their_text() -> None:
    changed = tampering.truncated(CHANGE)
    assert b'"record":{"n": 12.50, "fit": "' in changed
    read: dict[str, Any] = orjson.loads(changed)
    assert list(read["record"]) == ["n", "fit"]
    assert read["errors"] == ["Error 413: Payload Too Large"]
    assert list(read) == list(orjson.loads(CHANGE))


@pytest.mark.parametrize(
    ("code", "message"), [(400, "Error 400: Bad Request, no primary key"), (401, "Error 401: Unauthorized")]
)
def test_error_events_carry_no_row(code: int, message: str) -> None:
    assert orjson.loads(tampering.error_event(CHANGE, code)) == {
        "table": "t",
        "type": "UPDATE",
        "record": {},
        "columns": [],
        "errors": [message],
        "schema": "public",
        "commit_timestamp": None,
        "old_record": {},
    }


def test_an_oversized_change_is_the_same_change_beyond_one_mebibyte() -> None:
    padded = tampering.oversized(CHANGE)
    assert len(padded) > 1_048_576
    assert orjson.loads(padded) == orjson.loads(CHANGE)
