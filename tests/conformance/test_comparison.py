"""The comparison itself: that it finds each kind of difference, and overlooks only what may differ."""

import pytest

from tests.conformance.comparison import compare, judge
from tests.conformance.deviations import Deviation
from tests.conformance.frames import Frame, Labels, normalise
from tests.conformance.player import Played
from tests.conformance.script import Closed, Receive, Refused, Script


def change(
    value: str, *, number: int = 7, at: str = "2026-01-01T00:00:00.000Z", topic: str = "realtime:t"
) -> str:
    return (
        f'{{"ref":null,"event":"postgres_changes","topic":"{topic}","payload":{{"data":{{"table":"t",'
        f'"type":"INSERT","record":{{"v": {value}}},"columns":[{{"name": "v", "type": "numeric"}}],'
        f'"errors":null,"schema":"public","commit_timestamp":"{at}"}},"ids":[{number}]}}}}'
    )


def frames(*raw: str) -> list[Frame]:
    labels = Labels()
    return [normalise(text, labels) for text in raw]


def differences(promised: list[Frame], came: list[Frame]) -> list[str]:
    script = Script("x", [Receive("c", frame) for frame in promised])
    return [difference.where for difference in compare(script, Played([("c", frame) for frame in came]))]


def test_ids_and_times_may_differ_when_they_do_so_consistently() -> None:
    promised = frames(change("1"), change("2"), change("3", number=8, at="2026-01-01T00:00:01.000Z"))
    came = frames(
        change("1", number=99, at="2027-05-05T00:00:00.123Z"),
        change("2", number=99, at="2027-05-05T00:00:00.123Z"),
        change("3", number=98, at="2027-05-05T00:00:00.123Z"),
    )
    assert differences(promised, came) == []


@pytest.mark.parametrize(
    ("came", "where"),
    [
        ([change("1.50"), change("2")], ["c realtime:t #1"]),
        ([change("1.5")], ["c realtime:t #2"]),
        ([change("1.5"), change("2"), change("3")], ["c realtime:t extra after #2"]),
        ([change("2"), change("1.5")], ["c realtime:t extra after #0", "c realtime:t #2"]),
        ([change("1.5"), change("2", number=8)], ["c realtime:t #2"]),
        ([change("1.5"), change("2", at="2026-01-01T00:00:00.001Z")], ["c realtime:t commit_timestamp"]),
        (
            [change("1.5"), change("2", at="2026-01-01 00:00:00")],
            ["c realtime:t #2", "c realtime:t commit_timestamp"],
        ),
        (
            [
                change("1.5"),
                change("2").replace('"errors":null,"schema":"public"', '"schema":"public","errors":null'),
            ],
            ["c realtime:t #2"],
        ),
        (
            [change("1.5"), change("2", topic="realtime:u")],
            ["c realtime:t #2", "c realtime:u extra after #0"],
        ),
    ],
    ids=["digits", "missing", "extra", "order", "id", "time", "form of time", "order of keys", "topic"],
)
def test_every_other_difference_is_found(came: list[str], where: list[str]) -> None:
    assert differences(frames(change("1.5"), change("2")), frames(*came)) == where


def test_a_repeated_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeated"):
        normalise('{"topic":"t","event":"e","payload":{},"ref":"1","ref":"2"}', Labels())


def test_handshakes_and_close_codes_are_compared() -> None:
    script = Script("x", [Refused("a", 401, "no"), Closed("b", 1000)])
    assert compare(script, Played(refused={"a": (401, "no")}, closed={"b": 1000})) == []
    found = compare(script, Played(refused={"a": (403, "no"), "d": (500, "")}, closed={}))
    assert [difference.where for difference in found] == ["a handshake", "d handshake", "b close"]


def test_a_deviation_must_be_in_the_table_and_must_occur() -> None:
    script = Script("x", [Receive("c", frame) for frame in frames(change("1"), change("2"))])
    found = compare(script, Played([("c", frame) for frame in frames(change("1"), change("3"))]))
    row = Deviation("x", "c realtime:t #2", "because", instead='{"v": 3}')
    assert judge(script, found, [row]) == []
    assert judge(script, found, []) != []
    assert judge(script, found, [Deviation("x", "c realtime:t #2", "because", instead='{"v": 4}')]) != []
    assert "does not occur any more" in judge(script, [], [row])[0]
    assert judge(script, [], [Deviation("another", "c realtime:t #2", "because")]) == []
