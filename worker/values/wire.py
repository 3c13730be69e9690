"""What Realtime's rendering leaves out of a value, so that it must be read again or is missing.

Seen in the real server: columns that are absent (unchanged TOAST, or dropped by error 413), char(n) and
bit(n) cut to one character (walrus#54), NaN and infinities sent as null. It decides; worker.rows.repair acts.
"""

from typing import Final

from worker.catalogue import ColumnInfo

_NULL: Final = b"null"
# Cast by type name without length on their way, so that char(1) and bit(1) remain. Arrays of them alike.
_CUT: Final = frozenset({"bpchar", "bit", "_bpchar", "_bit"})
_MAY_BE_NAN: Final = frozenset({"numeric", "float4", "float8"})
_BPCHAR_HEADER: Final = 4


def is_cut(column: ColumnInfo) -> bool:
    """Tell whether Realtime cuts the values of this column to their first character.

    Such a column cannot be a lane key, a `by`, a filter or a usable primary key in plain delivery. A domain
    over char(n) is not cut: its cast keeps the domain's own length.
    """
    if column.type not in _CUT:
        return False
    length = column.typmod - _BPCHAR_HEADER if column.type.endswith("bpchar") else column.typmod
    return length != 1


def may_hide_nan(column: ColumnInfo) -> bool:
    """Tell whether a null of this column may stand for NaN or an infinity."""
    return column.value_type in _MAY_BE_NAN


def needs_repair(column: ColumnInfo, raw: bytes | None) -> bool:
    """Tell whether a value must be read again from the database.

    Args:
        column: the column as the catalogue has it.
        raw: its JSON text, or None where the payload lists the column but does not carry it.
    """
    if raw is None:
        return True
    if bytes(raw) == _NULL:
        return may_hide_nan(column)
    return is_cut(column)
