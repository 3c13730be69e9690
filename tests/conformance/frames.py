"""Frames in a form in which two runs can be compared: what may differ from run to run is replaced by labels.

Not a client and not a model of the protocol: apart from the replacements below every name, value, order of
keys and digit of a number is kept as it stood on the wire.

- A binding's id becomes `$1`, `$2`... in the order in which bindings are first answered, so that an id that
  changes between connections, or stands for two bindings, shows up as another label.
- A commit timestamp becomes `@` when it has the form it must have; `Frame.commit` keeps the time itself.
- A value of `now()` becomes `<now>`; the seconds in "expired N seconds ago" become `N`.
- The list of columns is shortened to "name type", and a text of more than 2000 characters to its length and
  digest.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LONGEST_TEXT = 2000

_COMMIT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_AGO = re.compile(r"expired \d+ seconds ago")


class Number(str):
    """The digits of a JSON number exactly as they were sent."""

    __slots__ = ()


@dataclass
class Labels:
    """The labels handed out in one run; `is_now` says whether a text is the run's own `now()`."""

    is_now: Callable[[str], bool] = lambda _text: False
    bindings: dict[str, str] = field(default_factory=dict)

    def binding(self, number: str) -> str:
        return self.bindings.setdefault(number, f"${len(self.bindings) + 1}")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame in comparable form; `commit` and `schema` are those of a change, None in any other frame."""

    topic: str
    event: str
    text: str
    commit: str | None
    schema: str | None


def parse(raw: str) -> Any:
    """Parse JSON with numbers kept digit by digit and without losing a repeated key in silence."""
    return json.loads(
        raw, parse_int=Number, parse_float=Number, parse_constant=Number, object_pairs_hook=_object
    )


def normalise(raw: str, labels: Labels) -> Frame:
    """Bring one frame of either protocol version into comparable form."""
    message = parse(raw)
    if isinstance(message, list):
        topic, event, payload = message[2], message[3], message[4]
    else:
        topic, event, payload = message["topic"], message["event"], message["payload"]
    data = _change_of(payload)
    commit = _normalise_change(data, labels) if data else None
    _normalise_ids(payload, labels)
    return Frame(topic, event, render(message), commit, data["schema"] if data else None)


def render(value: Any) -> str:
    """Write a parsed value as JSON again, numbers digit by digit, long texts shortened."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {render(v)}" for k, v in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    if isinstance(value, str):
        return json.dumps(_shorten(value), ensure_ascii=False)
    return json.dumps(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is repeated among {[key for key, _ in pairs]}")
    return found


def _shorten(text: str) -> str:
    text = _AGO.sub("expired N seconds ago", text)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"<{len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:16]}>"


def _change_of(payload: Any) -> dict[str, Any] | None:
    if not isinstance(payload, dict):
        return None
    # Channels joined the old way, by topic, get the data itself as payload.
    data = payload.get("data", payload)
    if isinstance(data, dict) and {"schema", "table", "type", "columns", "commit_timestamp"} <= data.keys():
        return data
    return None


def _normalise_ids(payload: Any, labels: Labels) -> None:
    if not isinstance(payload, dict):
        return
    response = payload.get("response")
    if isinstance(response, dict):
        for binding in response.get("postgres_changes") or []:
            binding["id"] = labels.binding(binding["id"])
    if isinstance(payload.get("ids"), list):
        payload["ids"] = [labels.binding(number) for number in payload["ids"]]


def _normalise_change(data: dict[str, Any], labels: Labels) -> str | None:
    """Replace what differs from run to run; returns the commit timestamp that stood there."""
    commit: str | None = data["commit_timestamp"]
    if isinstance(commit, str) and _COMMIT.fullmatch(commit):
        data["commit_timestamp"] = "@"
    data["columns"] = _shorten_columns(data["columns"])
    for key in ("record", "old_record"):
        for name, value in (data.get(key) or {}).items():
            if isinstance(value, str) and not isinstance(value, Number) and labels.is_now(value):
                data[key][name] = "<now>"
    return commit


def _shorten_columns(columns: Any) -> Any:
    if not isinstance(columns, list) or not all(
        isinstance(column, dict) and list(column) == ["name", "type"] for column in columns
    ):
        return columns
    return [f"{column['name']} {column['type']}" for column in columns]
