from typing import Any

import pytest

from standin.changes import BadSubscription, Binding, binding_id
from standin.server import bindings


def join(changes: object) -> dict[str, Any]:
    return {"config": {"postgres_changes": changes}}


def test_the_echo_lists_the_id_first_and_then_the_keys_in_order() -> None:
    request = bindings.read_request(
        "realtime:a", join([{"table": "t", "schema": "s", "filter": "a=eq.1", "event": "*"}])
    )
    assert [list(echoed) for echoed in request.echo()] == [["id", "event", "filter", "schema", "table"]]


def test_ids_depend_on_what_was_sent_and_on_nothing_else() -> None:
    sent = {"event": "*", "schema": "public", "table": "t"}
    assert bindings.wire_id(sent) == bindings.wire_id(dict(reversed(sent.items())))
    assert bindings.wire_id(sent) != bindings.wire_id({**sent, "note": "x"})
    assert 0 <= bindings.wire_id(sent) < 2**27


@pytest.mark.parametrize("changes", [{"event": "*"}, None, 5])
def test_bindings_that_are_no_list_are_none(changes: object) -> None:
    assert bindings.read_request("realtime:a", join(changes)).sent == ()


def test_entries_that_are_no_objects_are_passed_over() -> None:
    request = bindings.read_request("realtime:a", join([None, {"table": "t"}, "x"]))
    assert request.sent == ({"table": "t"},)
    assert not request.first_api


def test_without_config_the_topic_names_the_binding() -> None:
    request = bindings.read_request("realtime:public:t:k=eq.a:b", {})
    assert request.first_api
    assert request.sent == ({"schema": "public", "table": "t", "filter": "k=eq.a:b"},)


@pytest.mark.parametrize(
    ("sent", "event"),
    [
        ({}, "*"),
        ({"event": "insert"}, "INSERT"),
        ({"event": "TRUNCATE"}, "TRUNCATE"),
        ({"event": "whatever"}, "*"),
        ({"event": None}, "*"),
    ],
)
def test_events(sent: dict[str, Any], event: str) -> None:
    assert bindings.parse({"schema": "public", "table": "t", **sent}).event == event


def test_a_missing_schema_is_public() -> None:
    assert bindings.parse({"table": "t"}) == Binding("*", "public", "t", None, None)


@pytest.mark.parametrize(
    "sent",
    [
        {"event": "*"},
        {"schema": "public", "filter": "k=eq.1"},
        {"schema": "public", "table": "t", "filter": None},
        {"schema": "public", "table": None},
        {"schema": "public", "table": "t", "filter": 5},
    ],
)
def test_bindings_that_name_nothing_are_refused(sent: dict[str, Any]) -> None:
    with pytest.raises(BadSubscription, match=r"^No subscription params provided\. .* to: %\{"):
        bindings.parse(sent)


def test_bindings_that_mean_the_same_keep_the_ids_they_were_given_in_reverse_order() -> None:
    one, other = Binding("*", "public", "t", None, None), Binding("INSERT", "public", "t", None, None)
    ids = bindings.wire_ids([(one, 1), (other, 2), (one, 3)])
    assert ids == {binding_id(one): [3, 1], binding_id(other): [2]}
