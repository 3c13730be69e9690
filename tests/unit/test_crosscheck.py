"""Realtime compared with the log: whatever is dropped, doubled, late or out of order is counted exactly."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest

from worker.change import Column, LogChange, RawChange, encode_columns
from worker.reading.crosscheck import PATIENCE_MS, CrossCheck, milliseconds

TABLE = ("public", "orders")
COLUMNS = (Column("id", "int8", key=True), Column("note", "text"))
AT_MS = 1_780_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def logged(number: int, ms: int, change_type: str = "INSERT", micros: int = 0) -> RawChange:
    row: list[bytes | bool | None] = [str(number).encode(), b"x"]
    is_delete = change_type == "DELETE"
    return RawChange.of_log(
        LogChange(
            *TABLE,
            change_type,  # type: ignore[arg-type] # one of the literals
            encode_columns(COLUMNS),
            None if is_delete else row,
            row if is_delete else None,
            ms * 1000 + micros,
            7,
            1,
            0,
        )
    )


def heard(number: int, ms: int, change_type: str = "INSERT", *, key: bool = True) -> RawChange:
    row = {"note": "x"} | ({"id": number} if key else {})
    moment = (_EPOCH + timedelta(milliseconds=ms)).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    data = {
        "schema": TABLE[0],
        "table": TABLE[1],
        "type": change_type,
        "columns": [{"name": "id", "type": "int8"}, {"name": "note", "type": "text"}],
        "commit_timestamp": moment,
        "errors": None,
        "old_record" if change_type == "DELETE" else "record": row,
    }
    return RawChange.decode("realtime", json.dumps(data).encode())


def counting(most_open: int = 1000) -> CrossCheck:
    check = CrossCheck(most_open)
    check.log_passed(AT_MS)
    check.realtime_passed(AT_MS)
    check.expect(TABLE, ("id",), AT_MS)
    return check


def passed(check: CrossCheck, ms: int) -> None:
    check.log_passed(ms)
    check.realtime_passed(ms)


def test_both_sides_tell_the_same_time_of_a_commit() -> None:
    assert milliseconds(logged(1, AT_MS + 5, micros=999).commit_timestamp or "") == AT_MS + 5
    assert milliseconds(heard(1, AT_MS + 5).commit_timestamp or "") == AT_MS + 5


@pytest.mark.parametrize("change_type", ["INSERT", "UPDATE", "DELETE"])
@pytest.mark.parametrize("first", ["log", "realtime"])
def test_what_both_have_is_neither_missed_nor_extra(change_type: str, first: str) -> None:
    check = counting()
    both = [
        lambda: check.logged(logged(1, AT_MS + 1, change_type, micros=700)),
        lambda: check.heard(heard(1, AT_MS + 1, change_type)),
    ]
    for step in both if first == "log" else reversed(both):
        step()
    assert check.open == 0
    passed(check, AT_MS + 10_000)
    assert (check.missed, check.extra) == (0, 0)


def test_nothing_is_judged_before_both_are_later() -> None:
    check = counting()
    check.logged(logged(1, AT_MS + 1))
    check.heard(heard(2, AT_MS + 1))
    check.log_passed(AT_MS + 30_000)
    assert (check.missed, check.extra) == (0, 0)
    check.realtime_passed(AT_MS + 30_000)
    assert (check.missed, check.extra) == (1, 1)


def test_what_was_before_the_subscription_is_not_counted() -> None:
    check = CrossCheck()
    check.logged(logged(1, AT_MS - 50))
    check.logged(logged(2, AT_MS + 3))  # the log is ahead of the canary that Realtime shows now
    check.expect(TABLE, ("id",), AT_MS)
    check.heard(heard(2, AT_MS + 3))
    check.heard(heard(3, AT_MS + 4))
    passed(check, AT_MS + 10_000)
    assert (check.missed, check.extra) == (0, 1)


def test_rows_whose_key_was_cut_are_any_of_those_that_are_open() -> None:
    check = counting()
    for number in range(3):
        check.logged(logged(number, AT_MS + 1))
    check.heard(heard(0, AT_MS + 1, key=False))
    check.heard(heard(1, AT_MS + 1))
    passed(check, AT_MS + 10_000)
    assert (check.missed, check.extra) == (1, 0)


def test_a_silence_of_hours_takes_no_memory_and_is_counted_whole() -> None:
    check = counting(most_open=1000)
    for number in range(200_000):
        check.logged(logged(number, AT_MS + 1 + number // 10))
        assert check.open <= 1000
        if number % 10_000 == 0:
            check.log_passed(AT_MS + 1 + number // 10)
    passed(check, AT_MS + 10_000_000)
    assert (check.missed, check.extra, check.open) == (200_000, 0, 0)


def test_one_transaction_larger_than_all_bounds() -> None:
    check = counting(most_open=1000)
    for number in range(5000):
        check.logged(logged(number, AT_MS + 1))
    for number in range(4000):
        check.heard(heard(number, AT_MS + 1))
    assert check.open <= 1000
    passed(check, AT_MS + 10_000)
    assert (check.missed, check.extra) == (1000, 0)


def test_realtime_that_comes_back_after_a_long_time_repeats_nothing() -> None:
    check = counting()
    check.logged(logged(1, AT_MS + 1))
    check.log_passed(AT_MS + 2 + PATIENCE_MS)
    assert (check.missed, check.extra) == (1, 0), "nobody waits for ever"
    check.heard(heard(1, AT_MS + 1))
    passed(check, AT_MS + 3 * PATIENCE_MS)
    assert (check.missed, check.extra) == (1, 0)


def test_a_reading_begins_anew_and_keeps_the_totals() -> None:
    check = counting()
    check.logged(logged(1, AT_MS + 1))
    passed(check, AT_MS + 10_000)
    check.logged(logged(2, AT_MS + 20_000))
    check.begin()
    passed(check, AT_MS + 60_000)
    assert (check.missed, check.extra) == (1, 0)


@pytest.mark.parametrize("seed", range(60))
def test_random_drops_doubles_delays_and_swaps_are_counted_exactly(seed: int) -> None:
    chance = random.Random(seed)
    check = counting(most_open=100_000)
    moment, missed, extra = AT_MS + 1, 0, 0
    stream: list[tuple[float, int, RawChange | int]] = []
    for number in range(800):
        moment += chance.choice([0, 0, 1, 40])
        change_type = chance.choice(["INSERT", "UPDATE", "DELETE"])
        row = chance.randrange(40)
        stream.append((moment, 0, logged(row, moment, change_type, micros=chance.randrange(1000))))
        copies = chance.choices([0, 1, 2, 3], [10, 80, 8, 2])[0]
        missed, extra = missed + (copies == 0), extra + max(0, copies - 1)
        for _ in range(copies):
            late = chance.uniform(0, 900)
            stream.append((moment + late, 1, heard(row, moment, change_type, key=chance.random() < 0.95)))
        if number % 100 == 50:
            stream.append((moment, 0, moment))
            if chance.random() < 0.7:
                stream.append((moment + 950, 1, moment))
    for _, side, what in sorted(stream, key=lambda one: one[0]):
        if isinstance(what, int):
            (check.realtime_passed if side else check.log_passed)(what)
        else:
            (check.heard if side else check.logged)(what)
    passed(check, moment + 10_000)
    # A row without its key is any of its transaction: of one missed and one doubled the difference counts.
    assert check.missed - check.extra == missed - extra
    assert abs(check.missed - missed) <= sum(1 for _ in stream) * 0.01
    assert check.open == 0


@pytest.mark.parametrize("seed", range(40))
def test_with_keys_the_counts_are_exact_each(seed: int) -> None:
    chance = random.Random(seed)
    check = counting(most_open=100_000)
    missed = extra = 0
    sent: list[RawChange] = []
    for number in range(500):
        moment = AT_MS + 1 + number // 7
        check.logged(logged(number, moment, "UPDATE"))
        copies = chance.choices([0, 1, 2], [10, 80, 10])[0]
        missed, extra = missed + (copies == 0), extra + max(0, copies - 1)
        sent += [heard(number, moment, "UPDATE")] * copies
    chance.shuffle(sent)
    for one in sent:
        check.heard(one)
    passed(check, AT_MS + 10_000)
    assert (check.missed, check.extra) == (missed, extra)
