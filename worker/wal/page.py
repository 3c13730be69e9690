"""Rows of a table in the log, as a backfill writes them there: messages of one transaction. Pure.

A head says whose rows follow and what their columns are; then comes one message for each row. They are
written by paging.py, with `pg_logical_emit_message`, and by nobody else who knows the backfill's secret.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

HEAD: Final = "tailrace.page"
ROW: Final = "tailrace.row"
"""Prefixes of the messages. One of a row takes an ordinal, as an insert does."""


class PageColumn(msgspec.Struct, frozen=True, array_like=True):
    """A column, as the log would describe it."""

    name: str
    type_oid: int
    identity: bool = False
    """Part of the replica identity."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What the rows of a page have in common."""

    backfill: int
    secret: str
    """Of the backfill: whoever may write messages into the log need not be allowed to write the table."""
    handler: str
    schema: str
    table: str
    table_oid: int
    identity: str
    """pg_class.relreplident."""
    columns: tuple[PageColumn, ...]


_encode: Final = msgspec.json.Encoder().encode
_head: Final = msgspec.json.Decoder(Head).decode
_row: Final = msgspec.json.Decoder(list[str | None]).decode


def encode_head(head: Head) -> bytes:
    """Write a head."""
    return _encode(head)


def decode_head(content: bytes) -> Head | None:
    """Read a head; None where it is not one of ours."""
    try:
        return _head(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def decode_row(content: bytes, columns: int) -> Sequence[bytes | None] | None:
    """Read a row: Postgres's text of each value; None where it is not one with so many columns."""
    try:
        texts = _row(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if len(texts) != columns:
        return None
    return [None if one is None else one.encode() for one in texts]
