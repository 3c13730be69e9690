"""Who gets which of a batch of changes, and the text that they get.

The counterpart of the real server's `apply_rls`, for many changes at a time: a batch costs a fixed
number of round trips to Postgres, plus one per type that has no fast renderer, per filter with
values not seen before, and per role and claims on a table with row-level security.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import asyncpg
import structlog

from standin.changes.catalog import Catalog, Table
from standin.changes.judging import FilterJudge, visible_rows
from standin.changes.pgoutput import Absent, Relation, RowChange
from standin.changes.rendering import Values
from standin.changes.rows import Layout, Row
from standin.changes.subscribing import Interest, Subscription

log = structlog.get_logger(__name__)

Select = tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One change for one subscriber.

    Attributes:
        subscriber: as given to `subscribe`.
        data: JSON text of `payload.data`; the same object for all who see the same.
        ids: ids of the bindings that matched, the last binding first.
    """

    subscriber: Hashable
    data: bytes
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Claimant:
    """A subscription and those of its interests that mean one table, the last binding first."""

    subscription: Subscription
    interests: tuple[Interest, ...]


class Distribution:
    """The live subscriptions, and the distribution of changes to them."""

    def __init__(self, max_record_bytes: int) -> None:
        self._max_record_bytes = max_record_bytes
        self._subscriptions: dict[Hashable, Subscription] = {}
        self._claimants: dict[int, tuple[_Claimant, ...]] = {}
        self._catalog = Catalog()
        self._layouts: dict[int, Layout] = {}
        self._filters = FilterJudge()

    def add(self, subscription: Subscription) -> None:
        """Add a subscription, in the place of the subscriber's former one."""
        self._subscriptions[subscription.subscriber] = subscription
        self._index()

    def remove(self, subscriber: Hashable) -> None:
        """Remove a subscription, if there is one."""
        if self._subscriptions.pop(subscriber, None) is not None:
            self._index()

    def replace(self, former: Subscription, renewed: Subscription) -> bool:
        """Put `renewed` in the place of `former`, if that is still live; tell whether it was."""
        if self._subscriptions.get(former.subscriber) is not former:
            return False
        self.add(renewed)
        return True

    def subscriptions(self) -> list[Subscription]:
        """Return the live subscriptions."""
        return list(self._subscriptions.values())

    @property
    def idle(self) -> bool:
        """True while nobody wants any change."""
        return not self._claimants

    def _index(self) -> None:
        claimants: dict[int, list[_Claimant]] = {}
        for subscription in self._subscriptions.values():
            for oid in {oid for interest in subscription.interests for oid in interest.tables}:
                interests = tuple(i for i in reversed(subscription.interests) if oid in i.tables)
                claimants.setdefault(oid, []).append(_Claimant(subscription, interests))
        self._claimants = {oid: tuple(entries) for oid, entries in claimants.items()}

    async def deliveries(
        self, connection: asyncpg.Connection, changes: Sequence[RowChange]
    ) -> list[Delivery]:
        """Return what is to be delivered of `changes`, in their order."""
        # Subscriptions may come and go while we ask Postgres; this batch keeps to one state.
        claimants = self._claimants
        concerned = {change.relation.oid for change in changes} & claimants.keys()
        if not concerned:
            return []
        roles = {entry.subscription.role for oid in concerned for entry in claimants[oid]}
        tables = await self._catalog.read(connection, concerned, roles)
        batch = _Batch(self._filters, claimants)
        rows = list(self._rows(changes, tables))
        try:
            return await batch.deliveries(connection, rows)
        finally:
            self._filters.forget_batch()

    def _rows(self, changes: Iterable[RowChange], tables: dict[int, Table]) -> Iterable[Row]:
        layouts: dict[Relation, Layout | None] = {}
        by_identity: dict[int, Layout | None] = {}
        for change in changes:
            table = tables.get(change.relation.oid)
            if table is None:
                continue
            # Relations are compared once each, not once per change.
            if id(change.relation) not in by_identity:
                if change.relation not in layouts:
                    layouts[change.relation] = self._layout(change.relation, table)
                by_identity[id(change.relation)] = layouts[change.relation]
            layout = by_identity[id(change.relation)]
            if layout is not None:
                yield Row.of(change, layout, self._max_record_bytes)

    def _layout(self, relation: Relation, table: Table) -> Layout | None:
        known = self._layouts.get(relation.oid)
        if known is not None and known.serves(relation, table):
            return known
        layout = Layout.of(relation, table)
        if layout is None:
            log.warning("table changed before it was polled, change lost", table=relation.name)
        else:
            self._layouts[relation.oid] = layout
        return layout


class _Batch:
    """One call of `Distribution.deliveries`."""

    def __init__(self, filters: FilterJudge, claimants: dict[int, tuple[_Claimant, ...]]) -> None:
        self._filters = filters
        self._claimants = claimants
        self._values = Values()
        # (table, role, claims) -> key -> visible
        self._visible: dict[tuple[int, str, str], dict[tuple[bytes | None, ...], bool]] = {}

    async def deliveries(self, connection: asyncpg.Connection, rows: Sequence[Row]) -> list[Delivery]:
        for row in rows:
            row.render(self._values)
            self._want_filters(row)
        await self._values.render(connection)
        await self._filters.judge(connection)
        matches = [(row, self._matches(row)) for row in rows]
        await self._look_at_rows(connection, matches)
        deliveries: list[Delivery] = []
        for row, matching in matches:
            deliveries += self._deliveries_of(row, matching)
        return deliveries

    def _want_filters(self, row: Row) -> None:
        values = None
        for entry in self._claimants[row.layout.table.oid]:
            for interest in entry.interests:
                if not interest.conditions or not interest.binding.matches_event(row.change.type):
                    continue
                values = row.judged() if values is None else values
                for condition in interest.conditions:
                    index = row.layout.indices.get(condition.column)
                    value = None if index is None else values[index]
                    if index is not None and not isinstance(value, Absent):
                        self._filters.want(condition, row.layout.cast_names[index], value)

    def _matches(self, row: Row) -> list[tuple[_Claimant, Select, tuple[int, ...]]]:
        """Return the claimants whose event and filters match, with the ids, per selection of columns."""
        matches = []
        for entry in self._claimants[row.layout.table.oid]:
            ids: dict[Select, tuple[int, ...]] = {}
            refused = row.layout.view(entry.subscription.role, None).error and row.new is not None
            for interest in entry.interests:
                if interest.binding.matches_event(row.change.type) and (
                    refused or self._passes(row, interest)
                ):
                    select = interest.binding.select
                    ids[select] = (*ids.get(select, ()), interest.id)
            matches += [(entry, select, found) for select, found in ids.items()]
        return matches

    def _passes(self, row: Row, interest: Interest) -> bool:
        for condition in interest.conditions:
            index = row.layout.indices.get(condition.column)
            value = None if index is None else row.judged()[index]
            # What the log does not carry matches no filter, negated or not.
            if index is None or isinstance(value, Absent):
                return False
            if not self._filters.holds(condition, row.layout.cast_names[index], value):
                return False
        return True

    async def _look_at_rows(
        self,
        connection: asyncpg.Connection,
        matches: Sequence[tuple[Row, list[tuple[_Claimant, Select, tuple[int, ...]]]]],
    ) -> None:
        tables: dict[int, Table] = {}
        for row, matching in matches:
            table = row.layout.table
            if not table.row_security or row.new is None:
                continue
            tables[table.oid] = table
            for entry, _, _ in matching:
                subscription = entry.subscription
                if row.layout.view(subscription.role, None).error is None:
                    group = self._visible.setdefault((table.oid, subscription.role, subscription.claims), {})
                    group[row.key()] = False
        for (oid, role, claims), keys in self._visible.items():
            seen = await visible_rows(connection, tables[oid], role, claims, list(keys))
            self._visible[oid, role, claims] = dict(zip(keys, seen, strict=True))

    def _sees(self, row: Row, subscription: Subscription) -> bool:
        if not row.layout.table.row_security or row.new is None:
            return True
        if row.layout.view(subscription.role, None).error is not None:
            return True
        return self._visible[row.layout.table.oid, subscription.role, subscription.claims][row.key()]

    def _deliveries_of(
        self, row: Row, matching: list[tuple[_Claimant, Select, tuple[int, ...]]]
    ) -> Iterable[Delivery]:
        if not matching:
            return
        change = row.change
        if not row.finish(self._values):
            log.warning("row has a value that is no JSON, change withheld", table=row.layout.table.name)
            return
        texts: dict[tuple[str, Select], bytes] = {}
        for entry, select, ids in matching:
            subscription = entry.subscription
            if not self._sees(row, subscription):
                continue
            data = texts.get((subscription.role, select))
            if data is None:
                data = row.layout.view(subscription.role, select).data(
                    change.type,
                    row.record,
                    row.old_record,
                    change.commit_timestamp,
                    too_large=row.too_large,
                )
                texts[subscription.role, select] = data
            yield Delivery(subscription.subscriber, data, ids)
