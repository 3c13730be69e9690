import orjson
import pytest

from standin.server import frames


def test_object_frames_keep_the_key_order_of_the_real_server() -> None:
    payload = {"status": "ok", "response": {}}
    assert frames.encode(1, "phoenix", "phx_reply", payload, ref="1", join_ref="9") == (
        b'{"ref":"1","event":"phx_reply","topic":"phoenix","payload":{"status":"ok","response":{}}}'
    )


def test_array_frames_carry_the_join_ref() -> None:
    assert (
        frames.encode(2, "realtime:a", "system", {}, join_ref="2") == b'["2",null,"realtime:a","system",{}]'
    )


def test_messages_of_both_versions_are_read() -> None:
    wanted = frames.Message("realtime:a", "phx_leave", {}, "2", "1")
    text = '{"topic":"realtime:a","event":"phx_leave","payload":{},"ref":"2","join_ref":"1"}'
    assert frames.decode(text, 1) == wanted
    assert frames.decode('["1","2","realtime:a","phx_leave",{}]', 2) == wanted


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("not json", 1),
        ("", 1),
        ("[]", 1),
        ("5", 2),
        ('{"topic":1,"event":"x"}', 1),
        ('{"topic":"a"}', 1),
        ('["1","2","t","e"]', 2),
        ('{"topic":"a","event":"b","payload":{}}', 2),
        (b"\xff\xfe", 1),
    ],
)
def test_what_is_no_message_is_ignored(text: str | bytes, version: frames.Version) -> None:
    assert frames.decode(text, version) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_change_keeps_its_text(version: frames.Version) -> None:
    head, tail = frames.change_envelope(version, 'realtime:"a"', "postgres_changes")
    frame = head + b'{"data":{"record":{"n": 12.50}},"ids":[1]}' + tail
    assert b'{"n": 12.50}' in frame
    read = orjson.loads(frame)
    topic, payload = (read["topic"], read["payload"]) if version == 1 else (read[2], read[4])
    assert (topic, payload["ids"]) == ('realtime:"a"', [1])
    if version == 2:
        assert read[:2] == [None, None]
