"""One row change on its way to a frame: what the log left out is filled in, the rest is rendered.

Pure, except that values without a fast renderer are collected for Postgres (`Values`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from standin.changes.catalog import Table
from standin.changes.payload import View
from standin.changes.pgoutput import UNCHANGED, WHOLE_ROW_IDENTITY, Absent, Relation, RowChange, Value
from standin.changes.rendering import FAST, NULL, FastRenderer, Values, leave_to_postgres

# What wal2json writes around a row and around a value, roughly.
_ROW_OVERHEAD = 160
_VALUE_OVERHEAD = 54
# A character may take this many bytes when it is escaped in JSON.
_LONGEST_ESCAPE = 6


@dataclass(slots=True)
class Layout:
    """How the rows that the log describes as `relation` become those of `table`."""

    relation: Relation
    table: Table
    renderers: tuple[FastRenderer, ...]
    cast_names: tuple[str, ...]
    key_indices: tuple[int, ...]
    indices: dict[str, int]
    _views: dict[tuple[str, tuple[str, ...] | None], View] = field(default_factory=dict)

    @classmethod
    def of(cls, relation: Relation, table: Table) -> "Layout | None":
        """Return the layout, or None if the table is no longer the one that was written to.

        The real server loses such changes: it looks tables up by name, and their columns as well.
        """
        columns = [table.column(column.name) for column in relation.columns]
        found = [column for column in columns if column is not None]
        if (table.schema, table.name) != (relation.schema, relation.name) or len(found) != len(columns):
            return None
        indices = {column.name: index for index, column in enumerate(relation.columns)}
        return cls(
            relation=relation,
            table=table,
            renderers=tuple(FAST.get(column.type_oid, leave_to_postgres) for column in found),
            cast_names=tuple(column.cast_name for column in found),
            key_indices=tuple(indices[column.name] for column in table.key if column.name in indices),
            indices=indices,
        )

    def serves(self, relation: Relation, table: Table) -> bool:
        """Tell whether this is the layout for `relation` and `table`."""
        return self.table is table and self.relation == relation

    def view(self, role: str, select: tuple[str, ...] | None) -> View:
        """Return how `role` sees the rows with the selection `select`."""
        view = self._views.get((role, select))
        if view is None:
            view = View.of(self.table, self.relation, role, select)
            self._views[role, select] = view
        return view


@dataclass(slots=True)
class Row:
    """A change with its values completed; UNCHANGED marks what a frame cannot have.

    `record` and `old_record` are the JSON texts per column, None for what is absent; they are
    there after `render` and whole after `finish`.
    """

    change: RowChange
    layout: Layout
    new: list[Value] | None
    old: list[Value] | None
    too_large: bool
    record: list[bytes | None] | None = None
    old_record: list[bytes | None] | None = None
    _unfinished: list[tuple[list[bytes | None], int, str, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, change: RowChange, layout: Layout, max_record_bytes: int) -> "Row":
        """Return the row of a change."""
        too_large = _log_size_exceeds(change, layout, max_record_bytes)
        new, old = change.new, change.old
        if change.type == "UPDATE" and new is not None:
            new, old = _completed(change.relation, new, old, key_only=change.old_is_key)
        elif old is not None:
            if change.old_is_key:
                old = _only_identity(change.relation, old)
            if layout.table.row_security:
                # The row is gone: nobody can judge any more who was allowed to see it.
                old = [value if i in layout.key_indices else UNCHANGED for i, value in enumerate(old)]
        return cls(change, layout, new, old, too_large)

    def render(self, values: Values) -> None:
        """Render what can be rendered here; collect the rest for Postgres."""
        self.record = None if self.new is None else self._rendered(self.new, values)
        self.old_record = None if self.old is None else self._rendered(self.old, values)

    def _rendered(self, row: Sequence[Value], values: Values) -> list[bytes | None]:
        rendered: list[bytes | None] = []
        for value, renderer, cast_name in zip(
            row, self.layout.renderers, self.layout.cast_names, strict=True
        ):
            if value is None:
                rendered.append(NULL)
            elif isinstance(value, bytes):
                text = renderer(value)
                if text is None:
                    values.want(cast_name, value)
                    self._unfinished.append((rendered, len(rendered), cast_name, value))
                rendered.append(text)
            else:
                rendered.append(None)
        return rendered

    def finish(self, values: Values) -> bool:
        """Take what Postgres rendered; tell whether every value has a JSON form."""
        for rendered, index, cast_name, value in self._unfinished:
            rendered[index] = values.rendered(cast_name, value)
        return all(rendered[index] is not None for rendered, index, _, _ in self._unfinished)

    def judged(self) -> list[Value]:
        """Return the values that filters look at."""
        row = self.old if self.new is None else self.new
        assert row is not None  # noqa: S101 - a change has one of them
        return row

    def key(self) -> tuple[bytes | None, ...]:
        """Return the primary key of the row as it is now."""
        row = self.judged()
        return tuple(None if isinstance(row[i], Absent) else row[i] for i in self.layout.key_indices)  # type: ignore[misc] # Absent was told apart


def _completed(
    relation: Relation, new: list[Value], old: list[Value] | None, *, key_only: bool
) -> tuple[list[Value], list[Value]]:
    """Return record and old record of an update.

    The log has the old identity only where it changed, and no untouched TOAST; wal2json shows the
    identity always.
    """
    whole = relation.identity == WHOLE_ROW_IDENTITY
    if old is None:
        before = [
            value if column.in_identity else UNCHANGED
            for value, column in zip(new, relation.columns, strict=True)
        ]
    else:
        before = _only_identity(relation, old) if key_only and not whole else old
    after = [b if a is UNCHANGED else a for a, b in zip(new, before, strict=True)]
    return after, before


def _only_identity(relation: Relation, values: list[Value]) -> list[Value]:
    return [
        value if column.in_identity else UNCHANGED
        for value, column in zip(values, relation.columns, strict=True)
    ]


def _log_size_exceeds(change: RowChange, layout: Layout, limit: int) -> bool:
    """Tell whether wal2json's text of the change would be longer than `limit` bytes."""
    columns = len(layout.renderers)
    if change.size * _LONGEST_ESCAPE + 2 * columns * (_VALUE_OVERHEAD + 128) + _ROW_OVERHEAD < limit:
        return False
    size = _ROW_OVERHEAD
    for row in (change.new, change.old):
        for value, column, cast_name in zip(
            row or (), change.relation.columns, layout.cast_names, strict=False
        ):
            if isinstance(value, Absent):
                continue
            size += _VALUE_OVERHEAD + len(column.name.encode()) + len(cast_name)
            size += len(NULL) if value is None else len(orjson.dumps(value.decode()))
    return size > limit
