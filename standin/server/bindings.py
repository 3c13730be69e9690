"""The bindings of a phx_join: what is echoed, what is subscribed to, and what is refused in which words.

Pure. Filters are not read here, the change feed reads them together with the columns' types.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from standin.changes import Binding, binding_id
from standin.changes.bindings import parse_binding

TOPIC_PREFIX = "realtime:"
_EVENTS = frozenset({"*", "INSERT", "UPDATE", "DELETE", "TRUNCATE"})


@dataclass(frozen=True, slots=True)
class Request:
    """What one join asks for: the bindings as sent, and whether it came in the form of the first API.

    The first API has no `config`: the topic `realtime:schema:table:filter` names the one binding, and frames
    carry the change's type as their event.
    """

    sent: tuple[dict[str, Any], ...]
    first_api: bool

    def echo(self) -> list[dict[str, Any]]:
        """The bindings as the join reply lists them: id first, then the keys in order of the alphabet."""
        return [
            {"id": wire_id(sent), **{key: sent[key] for key in sorted(sent) if key != "id"}}
            for sent in self.sent
        ]


def read_request(topic: str, payload: object) -> Request:
    """The bindings in a join's payload; what is no binding is passed over, as the real server does."""
    if not isinstance(payload, dict) or "config" not in payload:
        names = topic.removeprefix(TOPIC_PREFIX).split(":", 2)
        return Request((dict(zip(("schema", "table", "filter"), names, strict=False)),), first_api=True)
    config = payload["config"]
    listed = config.get("postgres_changes") if isinstance(config, dict) else None
    if not isinstance(listed, list):
        return Request((), first_api=False)
    return Request(tuple(sent for sent in listed if isinstance(sent, dict)), first_api=False)


def wire_id(sent: Mapping[str, Any]) -> int:
    """The id that clients see: a hash of the binding as it was sent, the same on every connection."""
    text = orjson.dumps(dict(sent), option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) & 0x7FFFFFF


def parse(sent: Mapping[str, Any]) -> Binding:
    """The subscription that a binding means.

    Raises:
        BadSubscription: with the message of the system frame.
    """
    binding = parse_binding(sent)
    # Case does not matter to the server, and TRUNCATE is an event it knows, though it never sends one.
    event = str(sent.get("event", "*")).upper()
    return replace(binding, event=event if event in _EVENTS else "*")


def wire_ids(bindings: Iterable[tuple[Binding, int]]) -> dict[int, list[int]]:
    """From the feed's id of a binding to the ids that the client knows, in the order of a frame's `ids`.

    Bindings that mean the same but were sent differently (an unknown key, say) are one to the feed and two to
    the client. Frames list ids in reverse order of the bindings.
    """
    ids: dict[int, list[int]] = {}
    for binding, wire in bindings:
        ids.setdefault(binding_id(binding), []).insert(0, wire)
    return ids
