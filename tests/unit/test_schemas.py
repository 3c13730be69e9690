"""Which picture of a table a change was written under."""

from dataclasses import replace

import pytest

from worker.catalogue import Catalogue, ColumnInfo, Table
from worker.change import Column
from worker.schemas import fits, is_of_type, key_of, written_under

MOOD = 16_400


def table(*columns: tuple[str, str, int], key: tuple[str, ...] = ("id",), oid: int = 1) -> Table:
    infos = {name: ColumnInfo(name, kind, kind, type_oid=type_oid) for name, kind, type_oid in columns}
    return Table("public", "orders", oid, infos, key, "full", frozenset(infos))


NOW = table(("number", "text", 25), ("mood", "feeling", MOOD), ("extra", "int4", 23), key=("number",))
BEFORE = table(("id", "int4", 23), ("mood", "mood", MOOD))
FIRST = table(("id", "int4", 23), ("mood", "text", 25))


def test_a_type_is_itself_whatever_its_name() -> None:
    feeling = NOW.columns["mood"]
    assert is_of_type(feeling, Column("mood", "mood", MOOD))
    assert not is_of_type(feeling, Column("mood", "feeling", MOOD + 1))
    # Where nobody knows more, the name decides: Realtime tells no object ids.
    assert is_of_type(feeling, Column("mood", "feeling"))
    assert not is_of_type(feeling, Column("mood", "text"))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ([Column("number", "text"), Column("mood", "feeling", MOOD), Column("extra", "int4")], NOW),
        # A column more than the change has is no contradiction: it came later, or is not published.
        ([Column("number", "text"), Column("mood", "feeling", MOOD)], NOW),
        ([Column("id", "int4"), Column("mood", "mood", MOOD)], BEFORE),
        ([Column("id", "int4"), Column("mood", "text")], FIRST),
        # None fits: the newest that has the key.
        ([Column("id", "int4"), Column("gone", "text")], BEFORE),
        ([Column("code", "int4")], None),
        ([], None),
    ],
)
def test_the_newest_picture_that_fits(columns: list[Column], found: Table | None) -> None:
    assert written_under([NOW, BEFORE, FIRST], columns) is found
    if found is None:
        assert not any(fits(one, columns) for one in (NOW, BEFORE, FIRST))


def test_the_key_is_that_of_the_picture_else_what_the_log_says_else_todays() -> None:
    old = [Column("id", "int4", key=True), Column("mood", "text")]
    assert key_of([NOW, BEFORE], old) == ("id",)
    assert key_of([NOW], old) == ("id",)
    assert key_of([NOW], [Column("id", "int4"), Column("mood", "text")]) == ("number",)
    earlier = replace(NOW, earlier_keys=(("number",), ("code",), ("id",)))
    assert key_of([earlier], [Column("id", "int4"), Column("mood", "text")]) == ("id",)
    assert earlier == NOW  # it is no reason to look anew
    # Of two columns the log does not tell the order.
    assert key_of([NOW], [Column("a", "int4", key=True), Column("b", "int4", key=True)]) == ("number",)
    assert key_of([], old) == ("id",)
    assert key_of([], [Column("a", "int4")]) == ()


def test_a_catalogue_keeps_what_tables_were() -> None:
    name = ("public", "orders")
    catalogue = Catalogue({name: FIRST}, publication_exists=True)
    assert not catalogue.renew(Catalogue({name: FIRST}, publication_exists=True))
    assert catalogue.version == 0
    assert catalogue.renew(Catalogue({name: BEFORE}, publication_exists=True))
    assert catalogue.known(name) == (BEFORE, FIRST)
    assert catalogue.renew(Catalogue({}, publication_exists=True))
    assert catalogue.known(name) == (BEFORE, FIRST)
    assert name not in catalogue.tables
    assert catalogue.renew(Catalogue({name: NOW}, publication_exists=True))
    assert catalogue.known(name) == (NOW, BEFORE, FIRST)
    assert catalogue.version == 3
    assert catalogue.known(("public", "others")) == ()
