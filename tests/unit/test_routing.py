"""Routing: which handlers and lanes a change concerns, and when nobody can tell."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import column, select
from sqlalchemy.ext.asyncio import AsyncSession

from worker.catalogue import Catalogue, ColumnInfo, Table
from worker.change import Column, LogChange, RawChange, encode_columns
from worker.registry import Handlers
from worker.routing import Router, Routes, lane_of

LANES = 16
COLUMNS = {
    "id": ColumnInfo("id", "int8", "bigint", not_null=True),
    "customer_id": ColumnInfo("customer_id", "int8", "bigint"),
    "region": ColumnInfo("region", "region", "region", value="text"),
    "status": ColumnInfo("status", "text", "text"),
    "amount": ColumnInfo("amount", "numeric", "numeric"),
    "weight": ColumnInfo("weight", "float8", "double precision", not_null=True),
    "span": ColumnInfo("span", "int4range", "int4range"),
}
ROW = {
    "id": 1,
    "customer_id": 7,
    "region": "north",
    "status": "new",
    "amount": 12.5,
    "weight": 1,
    "span": "[1,5)",
}

Row = Mapping[str, Any]
Decorate = Callable[[Handlers], Callable[[Any], Any]]


def table(name: str = "orders", *, primary_key: tuple[str, ...] = ("id",)) -> Table:
    return Table(
        schema="public",
        name=name,
        oid=1,
        columns=COLUMNS,
        primary_key=primary_key,
        identity="full",
        identity_columns=frozenset(COLUMNS),
    )


CATALOGUE = Catalogue(
    {("public", name): table(name) for name in ("orders", "refunds")}, publication_exists=True
)


async def handler(given: Any, session: AsyncSession) -> None: ...


async def other(given: Any, session: AsyncSession) -> None: ...


def router(*decorate: Decorate, lanes: int = LANES, catalogue: Catalogue = CATALOGUE) -> Router:
    """Make a router for one handler, which the decorators are stacked on."""
    on = Handlers()
    for one in decorate:
        one(on)(handler)
    return Router(on.handlers(), catalogue, lanes)


def payload(  # what a frame's data has
    change_type: str,
    record: Row | None = None,
    old_record: Row | None = None,
    *,
    name: str = "orders",
    types: Mapping[str, str] | None = None,
    errors: list[str] | None = None,
) -> RawChange:
    types = types if types is not None else {column.name: column.type for column in COLUMNS.values()}
    data: dict[str, Any] = {
        "schema": "public",
        "table": name,
        "type": change_type,
        "columns": [{"name": column_name, "type": kind} for column_name, kind in types.items()],
        "commit_timestamp": "2026-11-20T10:20:46.372Z",
        "errors": errors,
    }
    if record is not None:
        data["record"] = record
    if old_record is not None:
        data["old_record"] = old_record
    return RawChange.decode("realtime", json.dumps(data).encode())


def insert(**values: object) -> RawChange:
    return payload("INSERT", {**ROW, **values})


def update(old: Row | None = None, **values: object) -> RawChange:
    return payload("UPDATE", {**ROW, **values}, {**ROW, **(old or {})})


def delete(**values: object) -> RawChange:
    return payload("DELETE", None, {**ROW, **values})


def keys(routes: Routes) -> list[str]:
    """Return the lane keys of the only handler; none if the change was filtered out."""
    assert not routes.unroutable
    assert len(routes.matched) + len(routes.filtered) == 1
    if routes.filtered:
        return []
    (routed,) = routes.matched
    assert routed.keys
    assert len(routed.keys) == len(set(routed.keys)) == len(routed.lanes)
    assert all(0 <= lane < LANES for lane in routed.lanes)
    assert routed.lanes == tuple(lane_of(routed.handler.name, key, LANES) for key in routed.keys)
    return [key.decode() for key in routed.keys]


def reason(routes: Routes) -> str:
    assert not routes.matched
    assert not routes.filtered
    ((_, reason),) = routes.unroutable
    return reason


def by_customer(on: Handlers) -> Callable[[Any], Any]:
    return on.derive("orders", by="customer_id")


def test_a_derive_handler_gets_the_keys_of_the_old_and_the_new_row() -> None:
    route = router(by_customer).route
    assert keys(route(insert())) == ['["7"]']
    assert keys(route(update())) == ['["7"]']
    assert keys(route(update({"customer_id": 3}))) == ['["3"]', '["7"]']
    assert keys(route(delete())) == ['["7"]']


def test_null_is_no_key_of_a_derive_handler() -> None:
    route = router(by_customer).route
    assert keys(route(insert(customer_id=None))) == []
    assert keys(route(delete(customer_id=None))) == []
    assert keys(route(update({"customer_id": None}, customer_id=None))) == []
    assert keys(route(update({"customer_id": None}))) == ['["7"]']
    assert keys(route(update({"customer_id": 3}, customer_id=None))) == ['["3"]']
    route = router(lambda on: on.derive("orders", by=("customer_id", "region"))).route
    assert keys(route(update({"region": None}))) == ['["7","north"]']


def test_the_primary_key_is_the_default() -> None:
    assert keys(router(lambda on: on.derive("orders")).route(update({"id": 9}))) == ['["9"]', '["1"]']
    route = router(lambda on: on.change("orders")).route
    assert keys(route(insert())) == ['["public.orders","1"]']
    assert keys(route(update({"id": 9}))) == ['["public.orders","9"]', '["public.orders","1"]']
    assert keys(route(delete())) == ['["public.orders","1"]']


def test_equal_keys_of_two_tables_meet_only_if_somebody_asks() -> None:
    refund = payload("INSERT", ROW, name="refunds")
    apart = router(lambda on: on.change("orders"), lambda on: on.change("refunds")).route
    assert keys(apart(refund)) == ['["public.refunds","1"]']
    together = router(
        lambda on: on.change("orders", lane_key="customer_id"),
        lambda on: on.change("refunds", lane_key="customer_id"),
    ).route
    assert keys(together(refund)) == keys(together(insert())) == ['["7"]']


def test_a_change_handler_orders_by_null_as_well() -> None:
    route = router(lambda on: on.change("orders", lane_key="customer_id")).route
    assert keys(route(insert(customer_id=None))) == ["[null]"]
    assert keys(route(update({"customer_id": None}))) == ["[null]", '["7"]']


def test_types() -> None:
    route = router(lambda on: on.insert("orders")).route
    assert keys(route(insert()))
    assert keys(route(update())) == []
    assert keys(route(delete())) == []


def test_a_table_that_nobody_wants() -> None:
    found = router(by_customer)
    assert found.tables == {("public", "orders")}
    assert found.route(payload("INSERT", ROW, name="other")) == Routes()


def test_columns_that_did_not_change() -> None:
    route = router(lambda on: on.change("orders", columns=["status", "amount"])).route
    assert keys(route(update())) == []
    assert keys(route(update({"customer_id": 3}))) == []
    assert keys(route(update({"status": "old"})))
    assert keys(route(update({"amount": None})))
    assert keys(route(insert()))
    assert keys(route(delete()))


def test_an_unchanged_toast_value_is_unchanged() -> None:
    route = router(lambda on: on.update("orders", columns=["status"])).route
    new = {name: value for name, value in ROW.items() if name != "status"}
    assert keys(route(payload("UPDATE", new, ROW))) == []
    cut = payload("UPDATE", new, ROW, errors=["Error 413: Payload Too Large"])
    assert reason(route(cut)) == (
        'columns= needs "status", which the UPDATE does not carry (Error 413: Payload Too Large)'
    )


def test_what_changes_the_derived_data_counts_although_columns_do_not_name_it() -> None:
    route = router(
        lambda on: on.derive("orders", by="customer_id", columns=["amount"], filter="status=eq.new")
    ).route
    assert keys(route(update({"amount": 1})))
    assert keys(route(update({"customer_id": 3}))) == ['["3"]', '["7"]']
    assert keys(route(update({"status": "paid"})))
    assert keys(route(update({"region": "south"}))) == []


def test_a_filter_judges_the_row_that_is_or_was() -> None:
    route = router(lambda on: on.change("orders", filter="status=eq.paid")).route
    assert keys(route(insert(status="paid")))
    assert keys(route(insert())) == []
    assert keys(route(insert(status=None))) == []
    assert keys(route(update({"status": "new"}, status="paid")))
    assert keys(route(update({"status": "paid"}, status="new"))) == []
    assert keys(route(delete(status="paid")))
    assert keys(route(delete())) == []


def test_a_derive_filter_is_met_by_the_old_or_the_new_row() -> None:
    route = router(lambda on: on.derive("orders", by="customer_id", filter="status=eq.paid")).route
    assert keys(route(update({"status": "paid"}, status="new"))) == ['["7"]']
    assert keys(route(update({"status": "new"}, status="paid"))) == ['["7"]']
    assert keys(route(update())) == []


def test_filters_compare_values_of_the_column_type() -> None:
    route = router(lambda on: on.insert("orders", filter="amount=eq.12.50")).route
    assert keys(route(insert(amount=12.5)))
    assert keys(route(insert(amount=12.51))) == []


def test_what_only_postgres_reads_can_be_asked_for_null() -> None:
    route = router(lambda on: on.insert("orders", filter="span=is.null")).route
    assert keys(route(insert(span=None)))
    assert keys(route(insert())) == []


def test_several_subscriptions_to_one_table() -> None:
    def stacked(on: Handlers) -> Callable[[Any], Any]:
        return lambda function: on.insert("orders")(on.update("orders", columns=["status"])(function))

    route = router(stacked).route
    assert keys(route(insert()))
    assert keys(route(update({"status": "old"})))
    assert keys(route(update({"amount": 1}))) == []
    assert keys(route(delete())) == []


def test_a_derive_handler_by_two_columns_gets_the_keys_of_both() -> None:
    def stacked(on: Handlers) -> Callable[[Any], Any]:
        return lambda function: on.derive("orders", by="customer_id")(on.derive("orders", by="id")(function))

    route = router(stacked).route
    assert keys(route(insert())) == ['["7"]', '["1"]']
    assert keys(route(insert(id=7))) == ['["7"]']


def test_each_handler_is_judged_for_itself() -> None:
    on = Handlers()
    on.derive("orders", by="customer_id")(handler)
    on.delete("orders")(other)
    routes = Router(on.handlers(), CATALOGUE, LANES).route(insert())
    assert [routed.handler.function for routed in routes.matched] == [handler]
    assert [found.function for found in routes.filtered] == [other]


# Values that are not there.


def without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


UNROUTABLE: list[tuple[Decorate, RawChange, str]] = [
    (
        by_customer,
        payload("INSERT", without(ROW, "customer_id"), errors=["Error 413: Payload Too Large"]),
        'by= needs "customer_id", which the INSERT does not carry (Error 413: Payload Too Large)',
    ),
    (
        by_customer,
        payload("DELETE", None, {"id": 1}),
        'by= needs "customer_id", which the DELETE does not carry',
    ),
    (
        by_customer,
        payload("UPDATE", ROW, {"id": 1}),
        'by= needs "customer_id", which the UPDATE does not carry',
    ),
    (by_customer, payload("UPDATE", ROW), 'by= needs "customer_id", which the UPDATE does not carry'),
    (
        lambda on: on.insert("orders"),
        payload("INSERT", {}, types={}, errors=["Error 401: Unauthorized"]),
        'the primary key needs "id", which the INSERT does not carry (Error 401: Unauthorized)',
    ),
    (
        lambda on: on.update("orders", columns=["status"]),
        payload("UPDATE", ROW, {"id": 1}),
        'columns= needs "status", which the UPDATE does not carry',
    ),
    (
        lambda on: on.insert("orders", filter="status=eq.paid"),
        payload("INSERT", without(ROW, "status")),
        'filter= needs "status", which the INSERT does not carry',
    ),
    (
        lambda on: on.change("orders", lane_key="weight"),
        insert(weight=None),
        'lane_key= needs "weight", and NaN and infinity are null in the payload',
    ),
    (
        lambda on: on.insert("orders"),
        payload("INSERT", ROW, types={"status": "text"}),
        'the primary key needs "id", which the INSERT does not carry',
    ),
    (
        by_customer,
        payload("TRUNCATE"),
        "TRUNCATE changes every key, and the handler has no all_keys= to name them",
    ),
]


@pytest.mark.parametrize(("decorate", "raw", "said"), UNROUTABLE)
def test_nothing_is_routed_by_an_absent_value(decorate: Decorate, raw: RawChange, said: str) -> None:
    assert reason(router(decorate).route(raw)) == said


def test_what_is_filtered_out_for_sure_needs_no_more_values() -> None:
    route = router(lambda on: on.derive("orders", by="customer_id", filter="status=eq.paid")).route
    assert keys(route(payload("INSERT", without(ROW, "customer_id")))) == []
    matched = route(payload("UPDATE", {**ROW, "status": "paid"}, without(ROW, "status")))
    assert keys(matched) == ['["7"]']
    assert reason(route(payload("UPDATE", ROW, without(ROW, "status")))).startswith('filter= needs "status"')


def test_one_subscription_that_matches_is_enough_for_a_change_handler() -> None:
    def stacked(on: Handlers) -> Callable[[Any], Any]:
        return lambda function: on.change("orders", filter="status=eq.new")(on.update("orders")(function))

    assert keys(router(stacked).route(payload("UPDATE", without(ROW, "status"), ROW)))


def test_one_subscription_that_cannot_tell_its_keys_is_too_much_for_a_derive_handler() -> None:
    def stacked(on: Handlers) -> Callable[[Any], Any]:
        return lambda function: on.derive("orders", by="customer_id")(on.derive("orders", by="id")(function))

    assert reason(router(stacked).route(payload("DELETE", None, {"id": 1}))).startswith(
        'by= needs "customer_id"'
    )


def test_a_table_that_vanished_from_the_catalogue() -> None:
    nothing = Catalogue({}, publication_exists=True)
    assert keys(router(by_customer, catalogue=nothing).route(insert())) == ['["7"]']
    lost = router(lambda on: on.change("orders"), catalogue=nothing).route(insert())
    assert reason(lost) == "public.orders has no primary key"


def test_truncate_is_for_those_that_ask_and_concerns_every_lane() -> None:
    truncate = payload("TRUNCATE")
    every = tuple(range(LANES))
    asking = router(lambda on: on.change("orders", types=["INSERT", "TRUNCATE"])).route(truncate)
    assert [(routed.keys, routed.lanes) for routed in asking.matched] == [((), every)]
    known = select(column("customer_id"))
    deriving = router(lambda on: on.derive("orders", by="customer_id", all_keys=known)).route(truncate)
    assert [(routed.keys, routed.lanes) for routed in deriving.matched] == [((), every)]
    assert keys(router(lambda on: on.change("orders")).route(truncate)) == []


# Tables that are altered.


def logged(*columns: Column, name: str = "orders", oid: int = 1, **values: bytes) -> RawChange:
    """Make an INSERT of the log."""
    row = [values[column.name] for column in columns]
    listed = encode_columns(columns)
    return RawChange.of_log(LogChange("public", name, "INSERT", listed, row, None, 0, 1, 1, 0, oid))


def test_a_renamed_key_is_the_same_key_and_found_by_what_the_log_says() -> None:
    by_key = router(lambda on: on.change("orders", name="one"))
    before = logged(Column("id", "int8"), id=b"1")
    after = logged(Column("number", "int8", key=True), number=b"1")
    assert not by_key.is_strange(before)
    assert by_key.is_strange(after)
    assert keys(by_key.route(before)) == keys(by_key.route(after)) == ['["public.orders","1"]']
    lost = by_key.route(logged(Column("number", "int8"), number=b"1"))
    assert reason(lost) == (
        'the primary key needs "id", which public.orders does not have (dropped or renamed?)'
    )


def test_a_renewed_catalogue_is_followed_at_once_and_the_old_picture_is_kept() -> None:
    name = ("public", "orders")
    catalogue = Catalogue({name: table()}, publication_exists=True)
    by_key = router(lambda on: on.change("orders", name="one"), catalogue=catalogue)
    old, new = logged(Column("id", "int8"), id=b"1"), logged(Column("number", "text"), number=b"n1")
    assert keys(by_key.route(old)) == ['["public.orders","1"]']
    number = ColumnInfo("number", "text", "text")
    renewed = Table("public", "orders", 1, {"number": number}, ("number",), "full", frozenset({"number"}))
    catalogue.renew(Catalogue({name: renewed}, publication_exists=True))
    assert not by_key.is_strange(new)
    assert keys(by_key.route(new)) == ['["public.orders","n1"]']
    assert by_key.is_strange(old)
    by_key.acquaint(old)
    assert not by_key.is_strange(old)
    assert keys(by_key.route(old)) == ['["public.orders","1"]']


def test_a_column_that_the_table_has_no_more_is_not_taken_for_unchanged() -> None:
    types = {name: column.type for name, column in COLUMNS.items() if name != "status"}
    row = without(ROW, "status")
    changed = payload("UPDATE", row, row, types=types)
    route = router(lambda on: on.update("orders", columns=["status"])).route
    assert reason(route(changed)) == (
        'columns= needs "status", which public.orders does not have (dropped or renamed?)'
    )


def test_a_table_under_another_name_is_noticed_by_its_object_id() -> None:
    catalogue = Catalogue({("public", "orders"): table()}, publication_exists=True)
    by_key = router(lambda on: on.change("orders", name="one"), catalogue=catalogue)
    renamed = by_key.route(logged(Column("id", "int8"), name="purchases", id=b"1"))
    assert reason(renamed) == "public.orders was renamed to public.purchases"
    assert renamed.followed_as == ("public", "orders")
    stranger = by_key.route(logged(Column("id", "int8"), name="purchases", oid=2, id=b"1"))
    assert (stranger.matched, stranger.filtered, stranger.unroutable) == ([], [], [])
    # Another table has taken its place: the old one is nobody's any more.
    successor = Table("public", "orders", 2, COLUMNS, ("id",), "full", frozenset(COLUMNS))
    catalogue.renew(Catalogue({("public", "orders"): successor}, publication_exists=True))
    gone = by_key.route(logged(Column("id", "int8"), name="orders_old", id=b"1"))
    assert not gone.unroutable


# Lanes and keys for any values.


def test_the_lane_of_a_key_never_changes() -> None:
    # Positions in Postgres outlive this program: if this test fails, mend the hash, not the test.
    assert [lane_of("orders:totals", b'["%d"]' % number, 16) for number in range(8)] == [
        8,
        0,
        9,
        13,
        6,
        14,
        12,
        0,
    ]
    assert lane_of("orders:totals", b'["public.orders","1"]', 1) == 0


def test_keys_spread_over_the_lanes() -> None:
    counts = [0] * LANES
    for number in range(16000):
        counts[lane_of("handlers.orders:totals", b'["%d"]' % number, LANES)] += 1
    assert min(counts) > 800
    assert max(counts) < 1200


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
MAYBE_CUSTOMER = st.none() | st.integers(-(2**63), 2**63 - 1)
ROWS = st.fixed_dictionaries({"customer_id": MAYBE_CUSTOMER, "region": st.none() | TEXTS})


@given(old=ROWS, new=ROWS)
def test_keys_are_those_of_old_and_new_row_and_no_others(old: Row, new: Row) -> None:
    route = router(lambda on: on.derive("orders", by=("customer_id", "region"))).route
    expected = [
        json.dumps([str(row["customer_id"]), row["region"]])
        for row in (old, new)
        if row["customer_id"] is not None and row["region"] is not None
    ]
    found = keys(route(update(old, **new)))
    assert [json.loads(key) for key in found] == [json.loads(key) for key in dict.fromkeys(expected)]
    assert set(found) == {*keys(route(delete(**old))), *keys(route(insert(**new)))}


@given(
    old=ROWS,
    new=ROWS,
    absent=st.sets(st.sampled_from(["customer_id", "region"])),
    side=st.sampled_from([0, 1]),
)
def test_no_key_without_its_values(old: Row, new: Row, absent: set[str], side: int) -> None:
    route = router(lambda on: on.derive("orders", by=("customer_id", "region"))).route
    rows = [{**ROW, **old}, {**ROW, **new}]
    rows[side] = without(rows[side], *absent)
    routes = route(payload("UPDATE", rows[1], rows[0], errors=["Error 413: Payload Too Large"]))
    assert len(routes.matched) + len(routes.filtered) + len(routes.unroutable) == 1
    for routed in routes.matched:
        complete = [row for row in rows if "customer_id" in row and "region" in row]
        possible = [[str(row["customer_id"]), row["region"]] for row in complete]
        assert all(json.loads(key) in possible for key in routed.keys)
    # The first value that is not there decides: NULL says that the row has no key, absence says nothing.
    first = next((name for name in ("customer_id", "region") if rows[side].get(name) is None), None)
    assert bool(routes.unroutable) == (first in absent)


def wire(text: str, kind: str) -> RawChange:
    """Build an insert whose column k has this JSON text."""
    columns = json.dumps([{"name": "k", "type": kind}])
    data = (
        f'{{"schema":"public","table":"keyed","type":"INSERT","columns":{columns},"record":{{"k":{text}}}}}'
    )
    return RawChange.decode("realtime", data.encode())


def wire_keys(kind: str, *texts: str) -> set[tuple[bytes, int]]:
    keyed = Table("public", "keyed", 1, {"k": ColumnInfo("k", kind, kind)}, ("k",), "full", frozenset("k"))
    catalogue = Catalogue({("public", "keyed"): keyed}, publication_exists=True)
    route = router(lambda on: on.derive("keyed"), catalogue=catalogue).route
    found = set()
    for text in texts:
        (routed,) = route(wire(text, kind)).matched
        found.add((routed.keys[0], routed.lanes[0]))
    return found


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6), st.integers(0, 5))
def test_a_number_has_one_lane_whatever_its_scale(number: Decimal, zeros: int) -> None:
    text = f"{number:f}"
    assert len(wire_keys("numeric", text, text + "0" * zeros, f'"{text}"')) == 1


@given(st.uuids())
def test_a_uuid_has_one_lane_whatever_its_case(value: UUID) -> None:
    assert len(wire_keys("uuid", f'"{value}"', f'"{str(value).upper()}"')) == 1


@given(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.just(UTC)))  # noqa: DTZ001 - bounds are naive
def test_a_moment_has_one_lane_whatever_its_zone(moment: datetime) -> None:
    zones = [UTC, timezone(timedelta(hours=-4)), timezone(timedelta(hours=5, minutes=45))]
    assert len(wire_keys("timestamptz", *(f'"{moment.astimezone(zone).isoformat()}"' for zone in zones))) == 1


@given(st.lists(TEXTS, min_size=2, max_size=8, unique=True))
def test_different_texts_have_different_keys(texts: list[str]) -> None:
    found = wire_keys("text", *(json.dumps(text) for text in texts))
    assert len(found) == len(texts)
    assert wire_keys("text", *(json.dumps(text, ensure_ascii=False) for text in texts)) == found
