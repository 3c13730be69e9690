"""From messages to changes with positions, transaction by transaction. Pure.

A position is (LSN of the commit, ordinal), the ordinal counted over all that the log sends: before anything
is left out here. Tables of our own schema are left out, so that our writes do not feed themselves, but for
the canary. Memory is bounded by whoever takes batches before a transaction is complete.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from worker.change import ChangeType, Column, Given, LogChange, Position, RawChange, encode_columns
from worker.errors import MalformedChange
from worker.wal.page import HEAD, ROW, decode_head, decode_row
from worker.wal.pgoutput import (
    Begin,
    Commit,
    Decoder,
    LogicalMessage,
    Relation,
    RelationColumn,
    Row,
    RowChange,
    Truncate,
    TypeName,
)

OWN_SCHEMA: Final = "tailrace"
CANARY: Final = (OWN_SCHEMA, "canary")
FIRST_OWN_OID: Final = 16_384
"""Types from here on are made by people, who may rename them; those below have the same name everywhere."""


class WalBatch(NamedTuple):
    """A portion of the log, in its order."""

    changes: Sequence[tuple[Position, RawChange]]
    """With their positions; may be empty, when only `read_to` moved."""
    read_to: int
    """All commits below this LSN have been handed over whole, in this batch or before. Moves at the end of a
    transaction, and outside one when the log goes on without changes; the slot may never pass it."""
    open: bool
    """The last transaction goes on in the next batch."""


class _Layout(NamedTuple):
    """What all changes of a relation have in common."""

    columns: bytes
    wanted: bool


_LEFT_OUT: Final = _Layout(b"", wanted=False)


class _Page(NamedTuple):
    """A backfill's rows that follow in this transaction."""

    relation: Relation
    given: Given


class Assembler:
    """Takes the messages of one stream (or one call) in order, gives batches.

    Args:
        names: type names by oid; must know the types of a relation before its first change.
        read_to: LSN from which on commits are wanted; those below it are passed over.
        after: position up to which changes were handed over before; they are passed over.
    """

    def __init__(self, names: Mapping[int, str], read_to: int = 0, after: Position | None = None) -> None:
        self._names = names
        self._decoder = Decoder()
        self._layouts: dict[Relation, _Layout] = {}
        self._after = after or Position(read_to, -1)
        self._begin: Begin | None = None
        self._page: _Page | None = None
        self._changes: list[tuple[Position, RawChange]] = []
        self._fresh = False
        self.read_to = read_to
        self.last = self._after
        """Position of the last change handed over, or up to which they were before."""
        self.bytes = 0
        """Size of the changes that wait to be taken."""
        self.said: dict[int, TypeName] = {}
        """Names of types as the log gave them, by oid."""

    @property
    def inside(self) -> bool:
        """A transaction is not complete yet."""
        return self._begin is not None

    @property
    def count(self) -> int:
        """How many changes wait to be taken."""
        return len(self._changes)

    def feed(self, data: bytes) -> set[int] | None:
        """Take one message.

        Returns:
            Oids of types whose names are needed before the next message, or None.

        Raises:
            MalformedChange: no message that can come here.
        """
        message = self._decoder.decode(data)
        if type(message) is RowChange:
            self._row(message, len(data))
        elif type(message) is Begin:
            self._begin = message
            self._page = None
        elif type(message) is Commit:
            self._begin = None
            self.pass_to(message.end_lsn)
        elif type(message) is Relation:
            return self._relation(message)
        elif type(message) is Truncate:
            self._truncate(message)
        elif type(message) is TypeName:
            self.said[message.oid] = message
        elif type(message) is LogicalMessage and message.transactional:
            return self._message(message, len(data))
        # Origin says nothing of rows, and messages of others say nothing to us.
        return None

    def pass_to(self, lsn: int) -> None:
        """Note that everything below an LSN has been read; of no effect inside a transaction."""
        if self._begin is None and lsn > self.read_to:
            self.read_to = lsn
            self._fresh = True

    def take(self) -> WalBatch | None:
        """Give what has come since the last time, or None if that is nothing."""
        if not self._changes and not self._fresh:
            return None
        batch = WalBatch(self._changes, self.read_to, self.inside)
        if self._changes:
            self.last = self._changes[-1][0]
        self._changes, self._fresh, self.bytes = [], False, 0
        return batch

    def _relation(self, relation: Relation) -> set[int] | None:
        unknown = {column.type_oid for column in relation.columns if column.type_oid not in self._names}
        return unknown or None

    def _layout(self, relation: Relation) -> _Layout:
        """Tell how changes of a relation are written; made at its first change, when the types are known."""
        name = (relation.schema, relation.name)
        if relation.schema == OWN_SCHEMA and name != CANARY:
            layout = _LEFT_OUT
        else:
            columns = _columns(relation, self._names)
            layout = _Layout(encode_columns(columns), wanted=True)
        # A relation is described anew whenever it changed: old descriptions are not asked for again.
        self._layouts = {one: known for one, known in self._layouts.items() if one.oid != relation.oid}
        self._layouts[relation] = layout
        return layout

    def _message(self, message: LogicalMessage, size: int) -> set[int] | None:
        """Take a page's head, or one of its rows; what is none, whoever wrote it, is passed over."""
        if message.prefix == HEAD:
            head = decode_head(message.content)
            if head is None:
                self._page = None
                return None
            columns = tuple(RelationColumn(one.name, one.type_oid, -1, one.identity) for one in head.columns)
            relation = Relation(head.table_oid, head.schema, head.table, head.identity, columns, ())
            self._page = _Page(relation, Given(head.backfill, head.secret, head.handler))
            return self._relation(relation)
        if message.prefix == ROW and self._page is not None and message.ordinal is not None:
            relation, given = self._page
            row = decode_row(message.content, len(relation.columns))
            if row is not None:
                self._add(relation, "INSERT", message.ordinal, list(row), None, size, given)
        return None

    def _row(self, row: RowChange, size: int) -> None:
        self._add(row.relation, row.type, row.ordinal, row.new, row.old, size)

    def _truncate(self, truncate: Truncate) -> None:
        for place, relation in enumerate(truncate.relations):
            self._add(relation, "TRUNCATE", truncate.ordinal + place, None, None, 0)

    def _add(
        self,
        relation: Relation,
        change_type: ChangeType,
        ordinal: int,
        new: Row | None,
        old: Row | None,
        size: int,
        given: Given | None = None,
    ) -> None:
        begin = self._begin
        if begin is None:
            raise MalformedChange("pgoutput: a change outside a transaction")
        position = Position(begin.final_lsn, ordinal)
        if position <= self._after:
            return
        layout = self._layouts.get(relation) or self._layout(relation)
        if not layout.wanted:
            return
        log = LogChange(
            relation.schema,
            relation.name,
            change_type,
            layout.columns,
            new,
            old,
            begin.committed,
            begin.xid,
            begin.final_lsn,
            ordinal,
            relation.oid,
            0 if given is None else given.backfill,
        )
        change = RawChange.of_log(log, given=given)
        self._changes.append((position, change))
        self.bytes += size


def _columns(relation: Relation, names: Mapping[int, str]) -> list[Column]:
    """Describe the columns of a relation."""
    # Of other identities the log does not say which columns the primary key has.
    says_key = relation.identity == "d"
    return [
        Column(
            column.name,
            names[column.type_oid],
            column.type_oid if column.type_oid >= FIRST_OWN_OID else 0,
            says_key and column.identity,
        )
        for column in relation.columns
    ]
