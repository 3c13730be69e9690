from standin.changes import sql


def test_identifiers_and_literals_are_quoted() -> None:
    assert sql.qualified("My Schema", 'a"b') == '"My Schema"."a""b"'
    assert sql.literal("it's") == "'it''s'"
    assert sql.literal("a\\b'") == " E'a\\\\b'''"


def test_array_elements_are_quoted_where_they_must() -> None:
    assert sql.array_literal(["1", "a b", "", "null", 'q"\\', "{"]) == r'{1,"a b","","null","q\"\\","{"}'
