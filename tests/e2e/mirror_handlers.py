"""A change handler that keeps a copy of a table, and writes down what it was given in which order."""

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table items (
  shop int not null, id int not null, version int not null, note text, code char(8), tags text[],
  doubled int generated always as (version * 2) stored,
  primary key (shop, id)
);
alter table items replica identity full;
create table derived_items (
  shop int not null, id int not null, version int not null, note text, code char(8), tags text[],
  primary key (shop, id)
);
create table derived_log (
  seq bigint generated always as identity primary key,
  shop int not null, id int not null, version int, old_shop int, old_id int, old_version int,
  source text not null, type text not null, position text not null, handler text not null
);
"""
DIFFERENCES = """
select count(*) from (select shop, id, version, note, code, tags from items) truth
full join derived_items copy using (shop, id)
where (truth.version, truth.note, truth.code, truth.tags)
  is distinct from (copy.version, copy.note, copy.code, copy.tags)
"""
"""How many rows of the copy are not what they should be."""

on = Handlers()


async def note(change: Change, session: AsyncSession, handler: str) -> None:
    new: Any = change.record or {}
    old: Any = change.old_record or {}
    row = {name: new.get(name, old.get(name)) for name in ("shop", "id")}
    row |= {"version": new.get("version")}
    row |= {f"old_{name}": old.get(name) for name in ("shop", "id", "version")}
    row |= {
        "source": change.source,
        "type": change.type,
        "position": str(change.position),
        "handler": handler,
    }
    await session.execute(
        text(
            "insert into derived_log"
            " (shop, id, version, old_shop, old_id, old_version, source, type, position, handler)"
            " values"
            " (:shop, :id, :version, :old_shop, :old_id, :old_version, :source, :type, :position, :handler)"
        ),
        row,
    )


@on.change("public.items", name="copy")
async def copy(change: Change, session: AsyncSession) -> None:
    await note(change, session, "copy")
    if change.old_record is not None:
        await session.execute(
            text("delete from derived_items where (shop, id) = (:shop, :id)"),
            {name: change.old_record[name] for name in ("shop", "id")},
        )
    if change.record is not None:
        await session.execute(
            text(
                "insert into derived_items values (:shop, :id, :version, :note, :code, :tags)"
                " on conflict (shop, id) do update set version = excluded.version, note = excluded.note,"
                " code = excluded.code, tags = excluded.tags"
            ),
            {name: change.record[name] for name in ("shop", "id", "version", "note", "code", "tags")},
        )


@on.change("public.items", name="odd", filter="version=gte.0", types={"INSERT", "DELETE"})
async def odd(change: Change, session: AsyncSession) -> None:
    await note(change, session, "odd")
