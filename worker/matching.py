"""What one subscription makes of a change: whether it wants it, and by which lane keys.

Pure, and hot: it is asked for every change of its table. What is decided by several subscriptions together is
in routing.py.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from worker.catalogue import Table
from worker.change import RawChange
from worker.declarations import Handler, Subscription
from worker.errors import FilterError
from worker.filters import Filter
from worker.schemas import is_of_type
from worker.values import Form, canonicalizer, decoder, may_hide_nan

_encode = msgspec.json.Encoder().encode
_Row = Mapping[str, msgspec.Raw]
_NULL = msgspec.Raw(b"null")  # a Raw equals no bytes, only another Raw
_UNREADABLE = (ValueError, ArithmeticError, msgspec.MsgspecError, RecursionError)


class UnroutableError(Exception):
    """A value that decides is not in the payload. The text is the reason."""


class Arm:
    """One subscription, made ready for many changes with one list of columns."""

    __slots__ = ("changed", "condition", "derives", "gone", "key", "types", "values")

    def __init__(
        self,
        handler: Handler,
        subscription: Subscription,
        table: Table | None,
        key: tuple[str, ...],
        names: AbstractSet[str],
    ) -> None:
        self.types = subscription.types
        self.derives = handler.kind == "derive"
        self.values = _Values(table, names)
        self.key = _Key(handler, subscription, key, self.values)
        self.condition = _bound(subscription.filter, table)
        self.changed: tuple[str, ...] = tuple(subscription.columns)
        if self.derives and self.changed:
            # A row that moves to another key, or in or out of the filter, changes what is derived.
            more = {*self.key.columns, *(subscription.filter.columns if subscription.filter else ())}
            self.changed = tuple(subscription.columns | more)
        # Left out of an UPDATE means unchanged, but for what the table has not.
        self.gone = next((name for name in sorted(self.changed) if names and name not in names), None)

    def keys(self, raw: RawChange) -> tuple[bytes, ...]:
        """Return the lane keys of the change, none if it is filtered out.

        Raises:
            UnroutableError: a value that decides is not in the payload.
        """
        change_type = raw.type
        if change_type not in self.types:
            return ()
        new = raw.record if change_type != "DELETE" else None
        old = raw.old_record if change_type != "INSERT" else None
        if change_type == "UPDATE" and self.changed and not self._has_changed(raw):
            return ()
        if self.condition is not None and not self._meets(raw, new, old):
            return ()
        return self.key.of(raw, new, old)

    def _has_changed(self, raw: RawChange) -> bool:
        """Compare as rendered: 1.0 and 1.00 differ, NaN and infinity (both null in plain) do not."""
        if self.gone is not None:
            raise _without(raw, self.gone, "columns=")
        new, old = raw.record or {}, raw.old_record or {}
        unknown = None
        for name in self.changed:
            if name not in new and not raw.errors:
                continue  # an unchanged TOAST value
            if name not in new or name not in old:
                unknown = name
            elif new[name] != old[name]:
                return True
        if unknown is not None:
            raise _absent(raw, unknown, "columns=")
        return False

    def _meets(self, raw: RawChange, new: _Row | None, old: _Row | None) -> bool:
        if not self.derives:
            return self._matches(raw, new if raw.type != "DELETE" else old)
        # What is derived from the old row changes as well as what is derived from the new one.
        unknown: UnroutableError | None = None
        for row, present in ((new, raw.type != "DELETE"), (old, raw.type != "INSERT")):
            if present:
                try:
                    if self._matches(raw, row):
                        return True
                except UnroutableError as error:
                    unknown = error
        if unknown is not None:
            raise unknown
        return False

    def _matches(self, raw: RawChange, row: _Row | None) -> bool:
        condition = self.condition
        if condition is None:
            return True
        values: dict[str, Any] = {}
        for name in condition.columns:
            value, type_name = self.values.find(raw, row, name, "filter=")
            decode = decoder(type_name, _form(raw))
            # What only Postgres reads can only be asked whether it is NULL: its text will do.
            null = value is None or value == _NULL
            values[name] = decode(value) if decode else None if null else str(value, "utf-8")
        return condition.matches(values)


class _Key:
    """Makes the lane keys of changes of one subscription."""

    __slots__ = ("columns", "drops_null", "option", "prefix", "values")

    def __init__(
        self, handler: Handler, subscription: Subscription, key: tuple[str, ...], values: "_Values"
    ) -> None:
        explicit = subscription.lane_key is not None
        self.columns = subscription.lane_key or key
        self.drops_null = handler.kind == "derive"
        self.prefix = [] if explicit or self.drops_null else [subscription.qualified]
        self.option = ("by=" if self.drops_null else "lane_key=") if explicit else "the primary key"
        self.values = values

    def of(self, raw: RawChange, new: _Row | None, old: _Row | None) -> tuple[bytes, ...]:
        change_type = raw.type
        if change_type == "INSERT":
            key = self._one(raw, new)
            return () if key is None else (key,)
        if change_type == "DELETE":
            key = self._one(raw, old)
            return () if key is None else (key,)
        first = self._one(raw, old)
        if new and old and all(name in old and new.get(name) == old[name] for name in self.columns):
            return () if first is None else (first,)
        second = self._one(raw, new)
        if second is None or second == first:
            return () if first is None else (first,)
        return (second,) if first is None else (first, second)

    def _one(self, raw: RawChange, row: _Row | None) -> bytes | None:
        """Return the key of one row; None for a derive handler's NULL, which is no key."""
        if not self.columns:
            raise UnroutableError(f"{raw.schema}.{raw.table} has no primary key")
        texts: list[str | None] = [*self.prefix]
        for name in self.columns:
            value, type_name = self.values.find(raw, row, name, self.option)
            try:
                text = canonicalizer(type_name, _form(raw))(value)
            except _UNREADABLE:
                raise _malformed(name, type_name) from None
            if text is None and self.drops_null:
                return None
            texts.append(text)
        return _encode(texts)


class _Values:
    """Finds values in the payloads of one table, as they stand there."""

    __slots__ = ("aliases", "names", "never_null")

    def __init__(self, table: Table | None, names: AbstractSet[str]) -> None:
        self.names = names
        columns = table.columns.values() if table is not None else ()
        self.aliases = {column.name: column for column in columns if column.value_type != column.type}
        """Domains and enums: the payload names their type, which says nothing about their values."""
        self.never_null = frozenset(c.name for c in columns if c.not_null and may_hide_nan(c))

    def find(self, raw: RawChange, row: _Row | None, name: str, option: str) -> tuple[msgspec.Raw, str]:
        """Return the value, and the name of the type by which to read it.

        Raises:
            UnroutableError: it is not there, or is not what the row holds.
        """
        if row is None or name not in row:
            if self.names and name not in self.names:
                raise _without(raw, name, option)
            raise _absent(raw, name, option)
        value = row[name]
        if name in self.never_null and value == _NULL:
            # A NOT NULL number that is null on the wire is NaN or an infinity; nobody can tell which.
            raise UnroutableError(f'{option} needs "{name}", and NaN and infinity are null in the payload')
        # The payload knows the type at the time of the change; the table may have been altered since.
        for column in raw.columns:
            if column.name == name:
                alias = self.aliases.get(name)
                return value, alias.value_type if alias and is_of_type(alias, column) else column.type
        raise _absent(raw, name, option)


def _form(raw: RawChange) -> Form:
    """Tell how the source writes values."""
    return "text" if raw.source == "wal" else "json"


def _bound(condition: Filter | None, table: Table | None) -> Filter | None:
    """Read the filter's operands as the types of the columns, as long as the two fit each other."""
    if condition is None or table is None:
        return condition
    try:
        return condition.bind(table)
    except FilterError:  # altered since the loader looked; judged by the type of each value
        return condition


def _absent(raw: RawChange, name: str, option: str) -> UnroutableError:
    because = f" ({'; '.join(raw.errors)})" if raw.errors else ""
    return UnroutableError(f'{option} needs "{name}", which the {raw.type} does not carry{because}')


def _without(raw: RawChange, name: str, option: str) -> UnroutableError:
    return UnroutableError(
        f'{option} needs "{name}", which {raw.schema}.{raw.table} does not have (dropped or renamed?)'
    )


def _malformed(name: str, type_name: str) -> UnroutableError:
    return UnroutableError(f'the value of "{name}" cannot be read as {type_name}')
