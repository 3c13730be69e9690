import pytest
from hypothesis import given
from hypothesis import strategies as st

from standin.changes import BadSubscription
from standin.changes.filters import OPERATORS, Condition, expression, parse_filter


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        (None, []),
        ("", []),
        ("  ", []),
        ("a=eq.1", [("a", "eq", "1", False)]),
        ("a=not.eq.1", [("a", "eq", "1", True)]),
        ("a=eq.1.50", [("a", "eq", "1.50", False)]),
        ("a=eq.x=y", [("a", "eq", "x=y", False)]),
        ('a=eq."x,y"', [("a", "eq", "x,y", False)]),
        ('a=eq."x\\"y"', [("a", "eq", 'x"y', False)]),
        ("a=gt.1,b=lt.2", [("a", "gt", "1", False), ("b", "lt", "2", False)]),
        ("a=in.(1,2,3)", [("a", "in", "{1,2,3}", False)]),
        ('a=in.(x,"b,c",d)', [("a", "in", '{x,"b,c",d}', False)]),
        ("a=in.(null,)", [("a", "in", '{"null",""}', False)]),
        ("a=is.null", [("a", "is", "null", False)]),
    ],
)
def test_filters_are_read(text: str | None, conditions: list[tuple[str, str, str, bool]]) -> None:
    assert [condition.described() for condition in parse_filter(text)] == conditions


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("k=foo.5", '["foo", "5"]'),
        ("k", '["k"]'),
        ("undefined", '["undefined"]'),
        ("name=eq.a,b", '["b"]'),
        ("k=eq", '["eq"]'),
        ("k=in.1,2", "`in` filter value must be wrapped by parentheses"),
        ("k=eq.1,", "filter must not contain empty segments (check for extra commas)"),
    ],
)
def test_what_is_no_filter_is_refused(text: str, what: str) -> None:
    with pytest.raises(BadSubscription) as refusal:
        parse_filter(text)
    assert str(refusal.value) == f"Error parsing `filter` params: {what}"


def test_expressions_cast_both_sides_and_quote_values() -> None:
    unequal = Condition("a", "neq", "it's", negated=True)
    assert expression(unequal, "text") == "not (v::text <> 'it''s'::text)"
    one = Condition("a", "in", "{1}", negated=False)
    assert expression(one, "integer") == "v::integer = any('{1}'::integer[])"
    assert expression(Condition("a", "is", "NULL", negated=False), "boolean") == "v::boolean is null"


@given(st.text(), st.sampled_from(sorted(OPERATORS)))
def test_no_text_breaks_the_reader(text: str, operator: str) -> None:
    for candidate in (text, f"a={operator}.{text}", f"a={operator}.({text})"):
        try:
            conditions = parse_filter(candidate)
        except BadSubscription:
            continue
        assert all(condition.operator in OPERATORS for condition in conditions)
