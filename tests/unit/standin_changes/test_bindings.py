import pytest

from standin.changes import BadSubscription, Binding, binding_id, parse_binding
from standin.changes.bindings import inspect, inspect_list

NOTHING = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: "


@pytest.mark.parametrize(
    ("params", "binding"),
    [
        ({"event": "INSERT", "schema": "s", "table": "t"}, Binding("INSERT", "s", "t", None, None)),
        ({"event": "insert", "table": "t"}, Binding("INSERT", "public", "t", None, None)),
        ({"event": "TRUNCATE", "table": "t"}, Binding("TRUNCATE", "public", "t", None, None)),
        ({"event": "whatever", "schema": "s"}, Binding("*", "s", None, None, None)),
        ({"schema": "*"}, Binding("*", "*", None, None, None)),
        (
            {"schema": "s", "table": "t", "filter": "a=eq.1", "select": ["a"], "foo": "bar"},
            Binding("*", "s", "t", "a=eq.1", ("a",)),
        ),
    ],
)
def test_params_mean_a_binding(params: dict[str, object], binding: Binding) -> None:
    assert parse_binding(params) == binding


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"event": "*"}, NOTHING + '%{"event" => "*"}'),
        (
            {"event": "*", "schema": "public", "filter": "k=eq.1"},
            NOTHING + '%{"event" => "*", "filter" => "k=eq.1", "schema" => "public"}',
        ),
        (
            {"schema": "public", "table": "flt", "filter": None},
            NOTHING + '%{"filter" => nil, "schema" => "public", "table" => "flt"}',
        ),
        ({"schema": "public", "table": None}, NOTHING + '%{"schema" => "public", "table" => nil}'),
        (
            {"schema": "public", "table": "flt", "filter": 5},
            NOTHING + '%{"filter" => 5, "schema" => "public", "table" => "flt"}',
        ),
        (
            {"schema": "public", "table": "t", "select": "id"},
            (
                "Error parsing `select` params: expected a list of column name strings, "
                'e.g. select: ["col1", "col2"]'
            ),
        ),
        (
            {"schema": "public", "select": ["id"]},
            (
                "Column selection is not supported for wildcard subscriptions. "
                "Provide an explicit schema and table name."
            ),
        ),
    ],
)
def test_params_that_mean_nothing_are_refused_in_the_words_of_the_server(
    params: dict[str, object], message: str
) -> None:
    with pytest.raises(BadSubscription) as refusal:
        parse_binding(params)
    assert str(refusal.value) == message


def test_id_is_stable_small_and_tells_bindings_apart() -> None:
    bindings = [
        Binding("*", "public", "t", None, None),
        Binding("*", "public", "t", "", None),
        Binding("*", "public", None, None, None),
        Binding("*", "public", "", None, None),
        Binding("INSERT", "public", "t", None, None),
        Binding("*", "public", "t", None, ("a",)),
        Binding("*", "public", "t", None, ("a", "b")),
    ]
    ids = [binding_id(binding) for binding in bindings]
    assert len(set(ids)) == len(bindings)
    assert all(0 <= number < 2**27 for number in ids)
    # Fixed for all time: clients may have it written down.
    assert binding_id(Binding("*", "public", "t", None, None)) == ids[0] == STABLE_ID


STABLE_ID = 6262319


def test_inspect_prints_as_elixir_does() -> None:
    assert inspect({"b": None, "a": [1, True, ("x", 'q"\\')]}) == (
        '%{"a" => [1, true, {"x", "q\\"\\\\"}], "b" => nil}'
    )


def test_long_lists_are_broken_into_lines() -> None:
    value = "{" + ",".join(map(str, range(40))) + "}"
    assert inspect_list([("k", "in", value, False)]) == (f'[\n  {{"k", "in",\n   "{value}",\n   false}}\n]')
    assert inspect_list([("k", "in", "{1,2}", False)]) == '[{"k", "in", "{1,2}", false}]'
