"""What Realtime's websocket frames say (protocol 1.0.0: one JSON object a frame). Pure: text in, frames out.

Sockets, channels and their states are not known here. The values of a row are never decoded: a change keeps
the exact text of its payload, so that a numeric arrives with every digit (the client library makes it a
float).
"""

from typing import NamedTuple

import msgspec

from worker.change import RawChange
from worker.errors import MalformedChange, TailraceError

TOPIC_PREFIX = "realtime:"


class MalformedFrame(TailraceError, ValueError):  # noqa: N818 - named after what it is about
    """A frame that cannot be read. Carries a reason of our own words, never a piece of the frame.

    Args:
        reason: what is wrong, fit for a log.
        topic: the channel it came on, None where not even that can be read.
    """

    def __init__(self, reason: str, topic: str | None = None) -> None:
        self.reason = reason
        self.topic = topic
        super().__init__(reason)


class ChangeFrame(NamedTuple):
    """A committed row operation, as one channel received it."""

    topic: str
    change: RawChange


class Reply(NamedTuple):
    """The answer to a join or to a heartbeat."""

    topic: str
    ref: str | None
    ok: bool
    reason: str
    """Realtime's words when not ok, else empty."""


class SystemNotice(NamedTuple):
    """What Realtime says of a subscription after the join; only this one tells that it is live."""

    topic: str
    extension: str
    ok: bool
    message: str


class ChannelEnded(NamedTuple):
    """The channel is closed (phx_close) or has crashed (phx_error)."""

    topic: str
    ref: str | None
    """The ref of the join that has ended, which may be an older one than the present join."""
    crashed: bool


class OtherFrame(NamedTuple):
    """A frame that is none of ours to act on (presence, broadcast, what a later server may add)."""

    topic: str
    event: str


Frame = ChangeFrame | Reply | SystemNotice | ChannelEnded | OtherFrame


class _ChangePayload(msgspec.Struct, gc=False):
    data: msgspec.Raw


class _ChangeEnvelope(msgspec.Struct, tag_field="event", tag="postgres_changes", gc=False):
    topic: str
    payload: _ChangePayload


class _Envelope(msgspec.Struct):
    topic: str
    event: str
    payload: msgspec.Raw = msgspec.Raw(b"{}")
    ref: str | None = None


class _ReplyPayload(msgspec.Struct):
    status: str
    response: msgspec.Raw = msgspec.Raw(b"{}")


class _Refusal(msgspec.Struct):
    reason: str = "no reason given"


class _SystemPayload(msgspec.Struct):
    status: str
    message: str = ""
    extension: str = ""


_change = msgspec.json.Decoder(_ChangeEnvelope)
_envelope = msgspec.json.Decoder(_Envelope)
_reply = msgspec.json.Decoder(_ReplyPayload)
_refusal = msgspec.json.Decoder(_Refusal)
_system = msgspec.json.Decoder(_SystemPayload)


def read_frame(text: bytes) -> Frame:
    """Read one frame.

    Args:
        text: the frame as it came, UTF-8.

    Raises:
        MalformedFrame: it is no Phoenix frame, or a change without its parts.
    """
    try:
        # Nearly every frame is a change: try that shape first, in one pass over the text.
        envelope = _change.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_rare(text)
    data = bytes(envelope.payload.data)
    try:
        if not data.isascii():
            data.decode()  # what is passed on as JSON text must be text: nobody behind us looks again
        return ChangeFrame(envelope.topic, RawChange.decode("realtime", data))
    except UnicodeDecodeError:
        raise MalformedFrame("not UTF-8", envelope.topic) from None
    except (MalformedChange, RecursionError):
        raise MalformedFrame("no change in a postgres_changes frame", envelope.topic) from None


def _read_rare(text: bytes) -> Frame:
    try:
        envelope = _envelope.decode(text)
    except msgspec.ValidationError:
        raise MalformedFrame("no Phoenix frame") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedFrame("not JSON") from None
    topic, event = envelope.topic, envelope.event
    try:
        if event == "postgres_changes":
            raise MalformedFrame("a postgres_changes frame without data", topic)
        if event == "phx_reply":
            return _read_reply(envelope)
        if event == "system":
            system = _system.decode(envelope.payload)
            return SystemNotice(topic, system.extension, system.status == "ok", system.message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedFrame("a frame of the protocol without its parts", topic) from None
    if event in {"phx_close", "phx_error"}:
        return ChannelEnded(topic, envelope.ref, crashed=event == "phx_error")
    return OtherFrame(topic, event)


def _read_reply(envelope: _Envelope) -> Reply:
    payload = _reply.decode(envelope.payload)
    if payload.status == "ok":
        return Reply(envelope.topic, envelope.ref, ok=True, reason="")
    try:
        reason = _refusal.decode(payload.response).reason
    except msgspec.DecodeError:
        # A refusal is a refusal whatever shape its explanation has.
        reason = "no reason given"
    return Reply(envelope.topic, envelope.ref, ok=False, reason=reason)
