"""Factories: plausible values for what must have one, and nothing else."""

import datetime as dt
import enum
from decimal import Decimal
from uuid import UUID

import pytest
from sqlalchemy import BigInteger, Computed, DateTime, ForeignKey, Identity, MetaData, Numeric, String, func
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker.testing import delete, factory, insert, update


class Base(DeclarativeBase):
    metadata = MetaData(schema="shop")


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    code: Mapped[str] = mapped_column("the_code", String(3))
    name: Mapped[str]
    price: Mapped[Decimal] = mapped_column(Numeric(4, 2))
    mood: Mapped[Mood]
    token: Mapped[UUID]
    at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True))
    local: Mapped[dt.datetime] = mapped_column(DateTime(timezone=False))
    facts: Mapped[dict[str, str]] = mapped_column(JSONB)
    tags: Mapped[list[str]] = mapped_column(ARRAY(String))
    made: Mapped[dt.datetime] = mapped_column(DateTime, server_default=func.now())
    note: Mapped[str | None]
    twice: Mapped[int] = mapped_column(Computed("id * 2"))


class Part(Base):
    __tablename__ = "parts"
    thing: Mapped[int] = mapped_column(ForeignKey(Thing.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Host(Base):
    __tablename__ = "hosts"
    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str] = mapped_column(INET)


def test_what_must_have_a_value_has_one_of_its_type() -> None:
    make = factory(Thing, name="given")
    first, second = make(), make(note="told")
    assert first.name == "given"
    assert len(first.code) == 3
    assert first.code != second.code
    assert isinstance(first.price, Decimal)
    assert first.price < 100
    assert first.mood is Mood.GOOD
    assert first.token != second.token
    assert first.at.tzinfo is not None
    assert first.local.tzinfo is None
    assert (first.facts, first.tags) == ({}, [])
    assert (first.id, first.made, first.note, first.twice) == (None, None, None, None)
    assert second.note == "told"


def test_what_nobody_can_guess_has_to_be_given() -> None:
    with pytest.raises(ValueError, match=r"Part.thing refers to shop.things.id: give it a value"):
        factory(Part)()
    assert factory(Part)(thing=3).number == 1
    with pytest.raises(ValueError, match=r"Host.address has type INET\(\): give it a value"):
        factory(Host)()
    with pytest.raises(TypeError, match="is no class mapped by SQLAlchemy"):
        factory(int)


def test_writes_are_by_column() -> None:
    write = insert(Thing, code="abc")
    assert (write.schema, write.table, write.values) == ("shop", "things", {"the_code": "abc"})
    assert insert(Thing(code="x", name="n"), name="m").values == {"the_code": "x", "name": "m"}
    assert insert("things").schema == "public"
    assert update(Part(thing=1, number=2), number=3).key == (1, 2)
    assert delete("shop.parts", (1, 2)).key == (1, 2)
    with pytest.raises(TypeError, match="Thing has no column attribute colour"):
        insert(Thing, colour="red")
    with pytest.raises(TypeError, match="takes no key"):
        delete(Part(thing=1, number=2), (1, 2))
    with pytest.raises(TypeError, match="is no table's name"):
        insert(3)
