"""Decides which handlers a change concerns, and in which lanes: by table, type, columns, filter and lane key.

Pure, and hot: the listener calls it for every change. Values are read from the payload alone, never from
the database: what is read later may be another version of the row. A value that routing needs and the
payload lacks makes the change unroutable for that handler, in words, never a guess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from worker.catalogue import Catalogue, Table
from worker.change import RawChange
from worker.declarations import Handler, Subscription
from worker.errors import FilterError
from worker.filters import Filter
from worker.values import Form, canonicalizer, decoder, may_hide_nan

_encode = msgspec.json.Encoder().encode
_Row = Mapping[str, msgspec.Raw]
_NULL = msgspec.Raw(b"null")  # a Raw equals no bytes, only another Raw
_UNREADABLE = (ValueError, ArithmeticError, msgspec.MsgspecError, RecursionError)


class Routed(NamedTuple):
    """A handler that wants the change."""

    handler: Handler
    keys: tuple[bytes, ...]
    """Distinct lane keys of the old and the new row: JSON arrays of canonical texts, as b'["17"]'.

    The default key of a change handler begins with the table, so that equal keys of two tables differ.
    Empty for a TRUNCATE, which concerns every key.
    """
    lanes: tuple[int, ...]
    """The lane of each key; for a TRUNCATE, all lanes."""


@dataclass(slots=True)
class Routes:
    """Where one change goes. Each handler of the change's table is in exactly one of the three lists."""

    matched: list[Routed] = field(default_factory=list)
    filtered: list[Handler] = field(default_factory=list)
    unroutable: list[tuple[Handler, str]] = field(default_factory=list)
    """With the reason: a value that decides is not in the payload."""


class _UnroutableError(Exception):
    """A value that decides is not in the payload. The text is the reason."""


def lane_of(handler_name: str, key: bytes, lanes: int) -> int:
    """Return the lane, from 0 on, of a key of a handler.

    Fixed for ever: positions of lanes outlive processes and versions, so neither Python's hash() nor
    anything that depends on the platform may decide.
    """
    digest = blake2b(b"%b\0%b" % (handler_name.encode(), key), digest_size=8).digest()
    return int.from_bytes(digest, "big") % lanes


class Router:
    """Routes changes to handlers that were validated against the same catalogue."""

    def __init__(self, handlers: Sequence[Handler], catalogue: Catalogue, lanes: int) -> None:
        plans: dict[tuple[str, str], dict[str, _Plan]] = {}
        for handler in handlers:
            for subscription in handler.subscriptions:
                name = (subscription.schema, subscription.table)
                plan = plans.setdefault(name, {}).setdefault(handler.name, _Plan(handler, lanes))
                plan.arms.append(_Arm(handler, subscription, catalogue.tables.get(name)))
        self._plans = {name: tuple(found.values()) for name, found in plans.items()}
        self.tables = frozenset(self._plans)
        """(schema, table) of every subscription."""

    def route(self, raw: RawChange) -> Routes:
        """Sort the handlers of the change's table into matched, filtered and unroutable. Never raises."""
        routes = Routes()
        for plan in self._plans.get((raw.schema, raw.table), ()):
            try:
                routed = plan.truncated() if raw.type == "TRUNCATE" else plan.routed(raw)
            except _UnroutableError as reason:
                routes.unroutable.append((plan.handler, str(reason)))
            else:
                if routed is None:
                    routes.filtered.append(plan.handler)
                else:
                    routes.matched.append(routed)
        return routes


class _Plan:
    """One handler and all its subscriptions to one table."""

    __slots__ = ("arms", "handler", "lanes", "name")

    def __init__(self, handler: Handler, lanes: int) -> None:
        self.handler = handler
        self.name = handler.name
        self.lanes = lanes
        self.arms: list[_Arm] = []

    def routed(self, raw: RawChange) -> Routed | None:
        keys = self._derived(raw) if self.handler.kind == "derive" else self._changed(raw)
        if not keys:
            return None
        name, lanes = self.name, self.lanes
        return Routed(self.handler, keys, tuple([lane_of(name, key, lanes) for key in keys]))

    def _derived(self, raw: RawChange) -> tuple[bytes, ...]:
        """Every subscription adds its keys; one that cannot tell them leaves the change unroutable."""
        if len(self.arms) == 1:
            return self.arms[0].keys(raw)
        return tuple(dict.fromkeys(key for arm in self.arms for key in arm.keys(raw)))

    def _changed(self, raw: RawChange) -> tuple[bytes, ...]:
        """Take the first subscription that matches. All of one table have the same lane key."""
        unknown: _UnroutableError | None = None
        for arm in self.arms:
            try:
                keys = arm.keys(raw)
            except _UnroutableError as error:
                unknown = unknown or error
            else:
                if keys:
                    return keys
        if unknown is not None:
            raise unknown
        return ()

    def truncated(self) -> Routed | None:
        handler = self.handler
        if handler.kind == "derive" and handler.all_keys is None:
            raise _UnroutableError(
                "TRUNCATE changes every key, and the handler has no all_keys= to name them"
            )
        if handler.kind == "derive" or any("TRUNCATE" in arm.types for arm in self.arms):
            return Routed(handler, (), tuple(range(self.lanes)))
        return None


class _Arm:
    """One subscription, made ready for many changes."""

    __slots__ = ("changed", "condition", "derives", "key", "types", "values")

    def __init__(self, handler: Handler, subscription: Subscription, table: Table | None) -> None:
        self.types = subscription.types
        self.derives = handler.kind == "derive"
        self.values = _Values(table)
        self.key = _Key(handler, subscription, table, self.values)
        self.condition = _bound(subscription.filter, table)
        self.changed: tuple[str, ...] = tuple(subscription.columns)
        if self.derives and self.changed:
            # A row that moves to another key, or in or out of the filter, changes what is derived.
            more = {*self.key.columns, *(subscription.filter.columns if subscription.filter else ())}
            self.changed = tuple(subscription.columns | more)

    def keys(self, raw: RawChange) -> tuple[bytes, ...]:
        """Return the lane keys of the change, none if it is filtered out.

        Raises:
            _UnroutableError: a value that decides is not in the payload.
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
        unknown: _UnroutableError | None = None
        for row, present in ((new, raw.type != "DELETE"), (old, raw.type != "INSERT")):
            if present:
                try:
                    if self._matches(raw, row):
                        return True
                except _UnroutableError as error:
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
        self, handler: Handler, subscription: Subscription, table: Table | None, values: "_Values"
    ) -> None:
        explicit = subscription.lane_key is not None
        self.columns = subscription.lane_key or (table.primary_key if table is not None else ())
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
            raise _UnroutableError(f"{raw.schema}.{raw.table} had no primary key when the listener started")
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

    __slots__ = ("aliases", "never_null")

    def __init__(self, table: Table | None) -> None:
        columns = table.columns.values() if table is not None else ()
        self.aliases = {column.name: column for column in columns if column.value_type != column.type}
        """Domains and enums: the payload names their type, which says nothing about their values."""
        self.never_null = frozenset(c.name for c in columns if c.not_null and may_hide_nan(c))

    def find(self, raw: RawChange, row: _Row | None, name: str, option: str) -> tuple[msgspec.Raw, str]:
        """Return the value, and the name of the type by which to read it.

        Raises:
            _UnroutableError: it is not there, or is not what the row holds.
        """
        if row is None or name not in row:
            raise _absent(raw, name, option)
        value = row[name]
        if name in self.never_null and value == _NULL:
            # A NOT NULL number that is null on the wire is NaN or an infinity; nobody can tell which.
            raise _UnroutableError(f'{option} needs "{name}", and NaN and infinity are null in the payload')
        # The payload knows the type at the time of the change; the table may have been altered since.
        for column in raw.columns:
            if column.name == name:
                alias = self.aliases.get(name)
                return value, alias.value_type if alias and alias.type == column.type else column.type
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


def _absent(raw: RawChange, name: str, option: str) -> _UnroutableError:
    because = f" ({'; '.join(raw.errors)})" if raw.errors else ""
    return _UnroutableError(f'{option} needs "{name}", which the {raw.type} does not carry{because}')


def _malformed(name: str, type_name: str) -> _UnroutableError:
    return _UnroutableError(f'the value of "{name}" cannot be read as {type_name}')
