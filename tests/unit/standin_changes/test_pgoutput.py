"""Messages put together by hand, from the format that PostgreSQL documents."""

import struct

import pytest

from standin.changes.pgoutput import UNCHANGED, Decoder, timestamp

BEGIN = b"B" + struct.pack(">QqI", 1, 773748823_375999, 700)
COMMIT = b"C" + struct.pack(">BQQq", 0, 1, 2, 0)


def relation(identity: bytes = b"d") -> bytes:
    columns = b"".join(
        struct.pack(">B", key) + name + b"\0" + struct.pack(">Ii", oid, -1)
        for key, name, oid in ((1, b"id", 23), (0, b"v", 25))
    )
    return b"R" + struct.pack(">I", 16400) + b"public\0t\0" + identity + struct.pack(">H", 2) + columns


def values(*items: bytes | str | None) -> bytes:
    encoded = b""
    for item in items:
        if item is None:
            encoded += b"n"
        elif isinstance(item, str):
            encoded += b"u"
        else:
            encoded += b"t" + struct.pack(">I", len(item)) + item
    return struct.pack(">H", len(items)) + encoded


HEAD = struct.pack(">I", 16400)


def test_changes_are_decoded() -> None:
    messages = [
        BEGIN,
        relation(),
        b"I" + HEAD + b"N" + values(b"1", None),
        b"U" + HEAD + b"N" + values(b"1", "unchanged"),
        b"U" + HEAD + b"K" + values(b"1", None) + b"N" + values(b"2", b"x"),
        b"T" + struct.pack(">IB", 1, 0) + HEAD,
        b"D" + HEAD + b"K" + values(b"2", None),
        COMMIT,
    ]
    changes = list(Decoder().changes(messages))
    assert [(c.type, c.new, c.old, c.old_is_key) for c in changes] == [
        ("INSERT", [b"1", None], None, False),
        ("UPDATE", [b"1", UNCHANGED], None, False),
        ("UPDATE", [b"2", b"x"], [b"1", None], True),
        ("DELETE", None, [b"2", None], True),
    ]
    assert {c.commit_timestamp for c in changes} == {timestamp(773748823_375999)}
    table = changes[0].relation
    assert (table.schema, table.name, table.identity) == ("public", "t", "d")
    assert [tuple(column) for column in table.columns] == [("id", 23, True), ("v", 25, False)]


def test_milliseconds_are_cut_and_not_rounded() -> None:
    assert timestamp(999_999) == "2000-01-01T00:00:00.999Z"


def test_values_that_are_no_text_are_refused() -> None:
    binary = b"I" + HEAD + b"N" + struct.pack(">H", 1) + b"b" + struct.pack(">I", 0)
    with pytest.raises(ValueError, match="unknown kind"):
        list(Decoder().changes([BEGIN, relation(), binary]))
