"""Decides which handlers a change concerns, and in which lanes: by table, type, columns, filter and lane key.

Pure, and hot: the listener calls it for every change. Values are read from the payload alone, never from
the database: what is read later may be another version of the row. A value that routing needs and the
payload lacks makes the change unroutable for that handler, in words, never a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from worker.catalogue import Catalogue
from worker.change import Column, RawChange
from worker.declarations import Handler, Subscription
from worker.matching import Arm, UnroutableError
from worker.schemas import fits, key_of, written_under

MOST_SCHEMAS = 16
"""Schemas of one table under which changes may come in turn, without being worked out anew each time."""


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
    """Where one change goes. Each handler of the change's table is in exactly one of the three lists.

    A row of a backfill concerns one handler alone.
    """

    matched: list[Routed] = field(default_factory=list)
    filtered: list[Handler] = field(default_factory=list)
    unroutable: list[tuple[Handler, str]] = field(default_factory=list)
    """With the reason: a value that decides is not in the payload."""
    followed_as: tuple[str, str] | None = None
    """(schema, table) by which handlers know the table, where it has another name by now."""


def lane_of(handler_name: str, key: bytes, lanes: int) -> int:
    """Return the lane, from 0 on, of a key of a handler.

    Fixed for ever: positions of lanes outlive processes and versions, so neither Python's hash() nor
    anything that depends on the platform may decide.
    """
    digest = blake2b(b"%b\0%b" % (handler_name.encode(), key), digest_size=8).digest()
    return int.from_bytes(digest, "big") % lanes


class Router:
    """Routes changes to handlers that were validated against the same catalogue, before it was renewed."""

    def __init__(self, handlers: Sequence[Handler], catalogue: Catalogue, lanes: int) -> None:
        followed: dict[tuple[str, str], _Followed] = {}
        for handler in handlers:
            for subscription in handler.subscriptions:
                name = (subscription.schema, subscription.table)
                followed.setdefault(name, _Followed(name, catalogue, lanes)).add(handler, subscription)
        self._followed = followed
        self._catalogue = catalogue
        self._oids: dict[int, _Followed] = {}
        self._version = -1
        self.tables = frozenset(followed)
        """(schema, table) of every subscription."""

    def route(self, raw: RawChange) -> Routes:
        """Sort the handlers of the change's table into matched, filtered and unroutable. Never raises."""
        routes = Routes()
        followed = self._followed.get((raw.schema, raw.table))
        if followed is None:
            if raw.table_oid:
                self._elsewhere(raw, routes)
            return routes
        for plan in followed.plans(raw.columns):
            if raw.given is not None and plan.name != raw.given.handler:
                continue
            try:
                routed = plan.truncated() if raw.type == "TRUNCATE" else plan.routed(raw)
            except UnroutableError as reason:
                routes.unroutable.append((plan.handler, str(reason)))
            else:
                if routed is None:
                    routes.filtered.append(plan.handler)
                else:
                    routes.matched.append(routed)
        return routes

    def is_strange(self, raw: RawChange) -> bool:
        """Tell whether a change was written under a schema that the catalogue does not show.

        Then the catalogue had better be read again before the change is routed, and `acquaint` be called.
        """
        followed = self._followed.get((raw.schema, raw.table))
        return followed is not None and followed.is_strange(raw.columns)

    def acquaint(self, raw: RawChange) -> None:
        """Note that the catalogue has been read again since the change was written: it may be older."""
        followed = self._followed.get((raw.schema, raw.table))
        if followed is not None:
            followed.acquaint(raw.columns)

    def _elsewhere(self, raw: RawChange, routes: Routes) -> None:
        """Notice the changes of a followed table that goes by another name now."""
        if self._version != self._catalogue.version:
            self._version = self._catalogue.version
            last = ((one, self._catalogue.known(name)) for name, one in self._followed.items())
            self._oids = {known[0].oid: one for one, known in last if known and known[0].oid}
        followed = self._oids.get(raw.table_oid)
        if followed is None:
            return
        name = ".".join(followed.name)
        reason = f"{name} was renamed to {raw.schema}.{raw.table}"
        routes.followed_as = followed.name
        routes.unroutable += [(plan.handler, reason) for plan in followed.plans(raw.columns)]


class _Followed:
    """One table that handlers follow, and how its changes are routed, by the columns that they list."""

    __slots__ = (
        "_catalogue",
        "_columns",
        "_judged",
        "_lanes",
        "_made",
        "_plans",
        "_version",
        "_wanted",
        "name",
    )

    def __init__(self, name: tuple[str, str], catalogue: Catalogue, lanes: int) -> None:
        self.name = name
        self._catalogue = catalogue
        self._lanes = lanes
        self._wanted: dict[str, tuple[Handler, list[Subscription]]] = {}
        self._made: dict[tuple[Column, ...], tuple[_Plan, ...]] = {}
        self._judged: set[tuple[Column, ...]] = set()
        # The columns of the last change: nearly always those of the next, and the same object.
        self._columns: tuple[Column, ...] | None = None
        self._plans: tuple[_Plan, ...] = ()
        self._version = catalogue.version

    def add(self, handler: Handler, subscription: Subscription) -> None:
        self._wanted.setdefault(handler.name, (handler, []))[1].append(subscription)

    def plans(self, columns: tuple[Column, ...]) -> tuple["_Plan", ...]:
        if columns is self._columns and self._version == self._catalogue.version:
            return self._plans
        if self._version != self._catalogue.version or len(self._made) >= MOST_SCHEMAS:
            self._made.clear()
            self._version = self._catalogue.version
        plans = self._made.get(columns)
        if plans is None:
            plans = self._made[columns] = self._make(columns)
        self._columns, self._plans = columns, plans
        return plans

    def _make(self, columns: tuple[Column, ...]) -> tuple["_Plan", ...]:
        known = self._catalogue.known(self.name)
        table = written_under(known, columns) or (known[0] if known else None)
        key = key_of(known, columns)
        names = {column.name for column in columns}
        return tuple(
            [
                _Plan(handler, self._lanes, [Arm(handler, one, table, key, names) for one in subscriptions])
                for handler, subscriptions in self._wanted.values()
            ]
        )

    def is_strange(self, columns: tuple[Column, ...]) -> bool:
        if columns is self._columns and self._version == self._catalogue.version:
            return False
        table = self._catalogue.tables.get(self.name)
        return columns not in self._judged and (table is None or not fits(table, columns))

    def acquaint(self, columns: tuple[Column, ...]) -> None:
        if len(self._judged) >= MOST_SCHEMAS:
            self._judged.clear()
        self._judged.add(columns)


class _Plan:
    """One handler and all its subscriptions to one table, for changes with one list of columns."""

    __slots__ = ("arms", "handler", "lanes", "name")

    def __init__(self, handler: Handler, lanes: int, arms: Sequence["Arm"]) -> None:
        self.handler = handler
        self.name = handler.name
        self.lanes = lanes
        self.arms = arms

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
        unknown: UnroutableError | None = None
        for arm in self.arms:
            try:
                keys = arm.keys(raw)
            except UnroutableError as error:
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
            raise UnroutableError("TRUNCATE changes every key, and the handler has no all_keys= to name them")
        if handler.kind == "derive" or any("TRUNCATE" in arm.types for arm in self.arms):
            return Routed(handler, (), tuple(range(self.lanes)))
        return None
