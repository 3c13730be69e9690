"""Frames as the real server sent them, and as none should."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.realtime.frames import (
    ChangeFrame,
    ChannelEnded,
    Frame,
    MalformedFrame,
    OtherFrame,
    Reply,
    SystemNotice,
    read_frame,
)

DATA = (
    '{"table":"t9","type":"UPDATE","record":{"id": 5137, "n": 0.1000, '
    '"big": 123456789012345678901234567890.5, "ts": "2026-11-20T11:00:20.752061+00:00"},'
    '"columns":[{"name": "id", "type": "int8"}],"errors":null,'
    '"schema":"public","commit_timestamp":"2026-11-20T11:00:20.752Z","old_record":{"id": 5137}}'
)


def change(data: str = DATA, topic: str = "realtime:s") -> bytes:
    return (
        f'{{"ref":null,"event":"postgres_changes","topic":"{topic}",'
        f'"payload":{{"data":{data},"ids":[92490160]}}}}'
    ).encode()


def test_a_change_keeps_its_exact_text() -> None:
    frame = read_frame(change())
    assert isinstance(frame, ChangeFrame)
    assert frame.topic == "realtime:s"
    raw = frame.change
    assert raw.payload == DATA.encode()
    assert (raw.source, raw.schema, raw.table, raw.type) == ("realtime", "public", "t9", "UPDATE")
    assert raw.commit_timestamp == "2026-11-20T11:00:20.752Z"
    assert raw.errors == ()
    assert raw.record is not None
    assert bytes(raw.record["n"]) == b"0.1000"
    assert bytes(raw.record["big"]) == b"123456789012345678901234567890.5"
    assert raw.old_record is not None
    assert bytes(raw.old_record["id"]) == b"5137"


def test_a_withheld_change_has_no_timestamp_and_is_read() -> None:
    data = (
        '{"table":"priv","type":"INSERT","record":{},"columns":[],"errors":["Error 401: Unauthorized"],'
        '"schema":"public","commit_timestamp":null}'
    )
    frame = read_frame(change(data))
    assert isinstance(frame, ChangeFrame)
    assert frame.change.errors == ("Error 401: Unauthorized",)
    assert frame.change.commit_timestamp is None


@pytest.mark.parametrize(
    ("event", "topic", "ref", "payload", "frame"),
    [
        (
            "phx_reply",
            "realtime:s",
            "1",
            {"status": "ok", "response": {"postgres_changes": [{"id": 92490160, "event": "*"}]}},
            Reply("realtime:s", "1", ok=True, reason=""),
        ),
        (
            "phx_reply",
            "phoenix",
            "2",
            {"status": "ok", "response": {}},
            Reply("phoenix", "2", ok=True, reason=""),
        ),
        (
            "phx_reply",
            "realtime:j",
            "1",
            {
                "status": "error",
                "response": {"reason": "MalformedJWT: The token provided is not a valid JWT"},
            },
            Reply("realtime:j", "1", ok=False, reason="MalformedJWT: The token provided is not a valid JWT"),
        ),
        (
            "phx_reply",
            "x",
            "9",
            {"status": "error", "response": "unmatched topic"},
            Reply("x", "9", ok=False, reason="no reason given"),
        ),
        (
            "system",
            "realtime:s",
            None,
            {"message": "Subscribed to PostgreSQL", "status": "ok", "extension": "postgres_changes"},
            SystemNotice("realtime:s", "postgres_changes", ok=True, message="Subscribed to PostgreSQL"),
        ),
        (
            "system",
            "realtime:e",
            None,
            {"message": "Token has expired 0 seconds ago", "status": "error", "extension": "system"},
            SystemNotice("realtime:e", "system", ok=False, message="Token has expired 0 seconds ago"),
        ),
        ("phx_close", "realtime:db2", "5", {}, ChannelEnded("realtime:db2", "5", crashed=False)),
        ("phx_error", "realtime:db2", "5", {}, ChannelEnded("realtime:db2", "5", crashed=True)),
        ("presence_state", "realtime:s", None, {}, OtherFrame("realtime:s", "presence_state")),
    ],
)
def test_the_protocol(event: str, topic: str, ref: str | None, payload: object, frame: Frame) -> None:
    text = json.dumps({"ref": ref, "event": event, "topic": topic, "payload": payload})
    assert read_frame(text.encode()) == frame


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        (b"", None),
        (b"not JSON", None),
        (b"[]", None),
        (b"{}", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (change('{"schema":"public"}'), "realtime:s"),
        (change('{"table":"t","type":"MERGE","schema":"public","columns":[]}'), "realtime:s"),
        (b'{"event":"postgres_changes","topic":"realtime:s","payload":{}}', "realtime:s"),
        (b'{"event":"system","topic":"realtime:s","payload":{"message":1}}', "realtime:s"),
        (b'{"event":"phx_reply","topic":"realtime:s","payload":null}', "realtime:s"),
        (change().replace(b'"id": 5137, "n"', b'"id": "\xff", "n"'), "realtime:s"),
        (change(DATA.replace("0.1000", "[" * 100_000)), None),
        (change()[:-1], None),
    ],
)
def test_what_cannot_be_read(text: bytes, topic: str | None) -> None:
    with pytest.raises(MalformedFrame) as error:
        read_frame(text)
    assert error.value.topic == topic
    assert len(error.value.reason) < 80
    assert "5137" not in str(error.value)


@given(st.binary(max_size=200))
def test_no_bytes_end_the_reader(text: bytes) -> None:
    with contextlib.suppress(MalformedFrame):
        read_frame(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["postgres_changes", "phx_reply", "system", "phx_close", "phx_error", "heartbeat"]),
)
def test_no_payload_ends_the_reader(payload: object, event: str) -> None:
    frame = {"event": event, "topic": "realtime:s", "payload": payload, "ref": None}
    try:
        read_frame(json.dumps(frame).encode())
    except MalformedFrame as error:
        assert error.topic == "realtime:s"  # noqa: PT017 - most payloads raise nothing
