"""Handlers of the tests of values: they write down what each value is in Python, and what is not there."""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

COLUMNS = """
  small smallint, whole int, big bigint, exact numeric(30,8), free numeric, short real, double float8,
  words text, bounded varchar(12), padded char(6), flag bool, day date, clock time, clock_zone timetz,
  moment timestamp, moment_zone timestamptz, second_zone timestamptz(0), span interval, code uuid,
  document json, binary_document jsonb, bytes bytea, numbers int[], texts text[], matrix int[][],
  feeling public.feeling, feelings public.feeling[], even public.even, pairing public.pairing, host inet,
  net cidr, mac macaddr, spot point, lexemes tsvector, direction vector(3), price money, bits bit(5),
  some_bits varbit, markup xml, whole_range int4range, period tstzrange, object oid, label name,
  "Odd name" int, amounts numeric[], lengths float8[],
  doubled int generated always as (whole * 2) stored
"""
TABLES = f"""
create extension vector;
create type public.feeling as enum ('low', 'so so', 'high');
create domain public.even as int check (value % 2 = 0);
create type public.pairing as (number int, word text);
create table kinds (id int primary key, {COLUMNS});
create table kinds_full (id int primary key, {COLUMNS});
alter table kinds_full replica identity full;
create table papers (
  id int primary key, title text, body text, fixed char(4), mask bit(3), weight float8, note text
);
create table papers_full (like papers including all);
alter table papers alter body set storage external;
alter table papers_full alter body set storage external;
alter table papers_full replica identity full;
create table derived_seen (
  seq int generated always as identity, source text not null, type text not null, key text not null,
  record jsonb, old_record jsonb, repaired text[] not null, missing text[] not null,
  unchanged text[] not null, reasons jsonb not null, old_reasons jsonb not null
);
"""

on = Handlers()


def told(value: object) -> list[str]:
    """Tell a value's type and how Python writes it; long texts by their end."""
    # Of 1E+100 and its hundred zeros both are the same number with the same scale.
    words = f"{value:f}" if isinstance(value, Decimal) else repr(value)
    return [type(value).__name__, words[-300:], str(len(words))]


def _row(row: Mapping[str, Any] | None) -> str | None:
    return None if row is None else json.dumps({name: told(value) for name, value in row.items()})


@on.change("public.kinds")
@on.change("public.kinds_full")
@on.change("public.papers")
@on.change("public.papers_full")
async def seen(change: Change, session: AsyncSession) -> None:
    await session.execute(
        text(
            "insert into derived_seen (source, type, key, record, old_record, repaired, missing, unchanged,"
            " reasons, old_reasons) values (:source, :type, :key, cast(:record as jsonb),"
            " cast(:old_record as jsonb), :repaired, :missing, :unchanged, cast(:reasons as jsonb),"
            " cast(:old_reasons as jsonb))"
        ),
        {
            "source": change.table,
            "type": change.type,
            "key": repr(change.key),
            "record": _row(change.record),
            "old_record": _row(change.old_record),
            "repaired": sorted(change.repaired),
            "missing": sorted(change.missing),
            "unchanged": sorted(change.unchanged),
            "reasons": json.dumps(dict(change.record.missing) if change.record is not None else {}),
            "old_reasons": json.dumps(dict(change.old_record.missing) if change.old_record else {}),
        },
    )
