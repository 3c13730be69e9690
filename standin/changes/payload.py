"""The text of `payload.data`: one row change as a role sees it.

Pure: the values come rendered. Everything that does not change from row to row is put together
once per table, role and selection, in a `View`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from standin.changes.catalog import Table
from standin.changes.pgoutput import Relation
from standin.changes.rendering import NULL

NO_KEY = "Error 400: Bad Request, no primary key"
UNAUTHORIZED = "Error 401: Unauthorized"
TOO_LARGE = "Error 413: Payload Too Large"
# A value of a row that is too large stays if its JSON text has at most this many bytes.
KEPT_VALUE_BYTES = 64

Rendered = Sequence[bytes | None]
"""JSON text per column of a relation; None where the frame is to have no key.

SQL NULL is the object `NULL` itself, which tells it from a JSON null in a jsonb column."""


@dataclass(slots=True)
class View:
    """How a table is shown to one role with one selection of columns.

    Attributes:
        error: what the role gets instead of inserted and updated rows, or None.
        order: indices of the relation's columns that are shown, in the order of a jsonb object
            (shorter names first, then by bytes), each with its key as JSON text.
        key_indices: those that belong to the primary key.
    """

    error: str | None
    order: tuple[tuple[int, bytes], ...]
    key_indices: frozenset[int]
    _table_name: bytes
    _columns: bytes
    _schema: bytes
    _heads: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table, relation: Relation, role: str, select: tuple[str, ...] | None) -> "View":
        """Return the view of `table`, whose rows the log describes as `relation`."""
        readable = table.readable(role)
        key = {column.name for column in table.key}
        shown = readable if select is None else readable & ({*select} | key)
        indices = {column.name: index for index, column in enumerate(relation.columns)}
        names = sorted(
            (name for name in shown if name in indices), key=lambda name: (len(name.encode()), name.encode())
        )
        columns = (
            b'{"name": ' + orjson.dumps(column.name) + b', "type": ' + orjson.dumps(column.type_name) + b"}"
            for column in table.columns
            if column.name in shown
        )
        return cls(
            error=NO_KEY if not key else UNAUTHORIZED if not key <= readable else None,
            order=tuple((indices[name], orjson.dumps(name) + b": ") for name in names),
            key_indices=frozenset(indices[name] for name in key if name in indices),
            _table_name=orjson.dumps(table.name),
            _columns=b"[" + b", ".join(columns) + b"]",
            _schema=orjson.dumps(table.schema),
        )

    def data(
        self,
        event: str,
        record: Rendered | None,
        old_record: Rendered | None,
        commit_timestamp: str,
        *,
        too_large: bool,
    ) -> bytes:
        """Return the JSON text of the change, keys in the real server's order."""
        if self.error is not None and event != "DELETE":
            return self._refused(event)
        parts = [self._head(event)]
        if record is not None:
            parts += [b'"record":', self._object(record, too_large=too_large), b","]
        parts += [b'"columns":', self._columns, b',"errors":']
        parts += [b"[", orjson.dumps(TOO_LARGE), b"]"] if too_large else [b"null"]
        parts += [b',"schema":', self._schema, b',"commit_timestamp":"', commit_timestamp.encode(), b'"']
        if old_record is not None:
            parts += [b',"old_record":', self._object(old_record, too_large=too_large)]
        parts.append(b"}")
        return b"".join(parts)

    def _head(self, event: str) -> bytes:
        head = self._heads.get(event)
        if head is None:
            head = b'{"table":%b,"type":"%b",' % (self._table_name, event.encode())
            self._heads[event] = head
        return head

    def _refused(self, event: str) -> bytes:
        return b'%b"record":{},"columns":[],"errors":[%b],"schema":%b,"commit_timestamp":null%b}' % (
            self._head(event),
            orjson.dumps(self.error),
            self._schema,
            b',"old_record":{}' if event == "UPDATE" else b"",
        )

    def _object(self, values: Rendered, *, too_large: bool) -> bytes:
        members = []
        for index, key in self.order:
            value = values[index]
            if value is None or (too_large and (value is NULL or len(value) > KEPT_VALUE_BYTES)):
                continue
            members.append(key + value)
        return b"{" + b", ".join(members) + b"}"
