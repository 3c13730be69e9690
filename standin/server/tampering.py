"""What faults make of a change: the payload text of one change in, another payload text out. Pure.

Values are moved as text, never parsed: a numeric keeps its digits.
"""

import msgspec
import orjson

OVERSIZE_BYTES = 1_048_576 + 1024
_KEPT_VALUE_BYTES = 64
_ERRORS = {
    400: b'["Error 400: Bad Request, no primary key"]',
    401: b'["Error 401: Unauthorized"]',
    413: b'["Error 413: Payload Too Large"]',
}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def truncated(data: bytes) -> bytes:
    """The change as the server sends a row that is too large: only short values, and no NULL, are left."""
    parts = {name: bytes(value) for name, value in _fields.decode(data).items()}
    for name in ("record", "old_record"):
        if name in parts:
            parts[name] = _object(
                {
                    column: bytes(value)
                    for column, value in _fields.decode(parts[name]).items()
                    if bytes(value) != b"null" and len(bytes(value)) <= _KEPT_VALUE_BYTES
                },
                b", ",
                b": ",
            )
    parts["errors"] = _ERRORS[413]
    return _object(parts, b",", b":")


def error_event(data: bytes, code: int) -> bytes:
    """The change as an error 400 or 401: its table and type, and nothing of its row."""
    parts = {name: bytes(value) for name, value in _fields.decode(data).items()}
    for name in ("record", "old_record"):
        if name in parts:
            parts[name] = b"{}"
    parts.update(columns=b"[]", errors=_ERRORS[code], commit_timestamp=b"null")
    return _object(parts, b",", b":")


def oversized(data: bytes) -> bytes:
    """The same change, padded with blanks beyond the frame size that clients accept."""
    return b"{" + b" " * max(0, OVERSIZE_BYTES - len(data)) + data[1:]


def change_type(data: bytes) -> str:
    """The type of a change: INSERT, UPDATE or DELETE."""
    return str(orjson.loads(bytes(_fields.decode(data)["type"])))


def _object(parts: dict[str, bytes], comma: bytes, colon: bytes) -> bytes:
    return b"{" + comma.join(orjson.dumps(name) + colon + value for name, value in parts.items()) + b"}"
