"""Phoenix frames as text: vsn 1.0.0 (objects) and 2.0.0 (arrays). Pure; knows nothing of sockets or channels.

Keys are written in the order of the real server.
"""

from dataclasses import dataclass
from typing import Any, Literal

import orjson

Version = Literal[1, 2]
_ARRAY_LENGTH = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client; `ref` and `join_ref` are echoed as they came, whatever their type."""

    topic: str
    event: str
    payload: Any
    ref: Any
    join_ref: Any


def decode(text: bytes | str, version: Version) -> Message | None:
    """The message in a websocket text, or None where the real server ignores it."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if version == 1 and isinstance(value, dict):
        topic, event = value.get("topic"), value.get("event")
        payload, ref, join_ref = value.get("payload"), value.get("ref"), value.get("join_ref")
    elif version == 2 and isinstance(value, list) and len(value) == _ARRAY_LENGTH:  # noqa: PLR2004 (a version)
        join_ref, ref, topic, event, payload = value
    else:
        return None
    if not isinstance(topic, str) or not isinstance(event, str):
        return None
    return Message(topic, event, payload, ref, join_ref)


def encode(
    version: Version, topic: str, event: str, payload: object, *, ref: object = None, join_ref: object = None
) -> bytes:
    """A frame to a client; vsn 1.0.0 has no place for `join_ref`."""
    if version == 1:
        return orjson.dumps({"ref": ref, "event": event, "topic": topic, "payload": payload})
    return orjson.dumps([join_ref, ref, topic, event, payload])


def encode_reply(
    version: Version, message: Message, status: str, response: object, *, join_ref: object
) -> bytes:
    """The phx_reply to `message`."""
    payload = {"status": status, "response": response}
    return encode(version, message.topic, "phx_reply", payload, ref=message.ref, join_ref=join_ref)


def change_envelope(version: Version, topic: str, event: str) -> tuple[bytes, bytes]:
    """What stands before and after the payload of a change frame, which is put together as text.

    The payload keeps its own text that way: a numeric would not survive a parser.
    """
    if version == 1:
        head = b'{"ref":null,"event":' + orjson.dumps(event) + b',"topic":' + orjson.dumps(topic)
        return head + b',"payload":', b"}"
    return b"[null,null," + orjson.dumps(topic) + b"," + orjson.dumps(event) + b",", b"]"
