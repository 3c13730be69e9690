"""Five tables of rows with owners, and handlers that write down what they were given.

Nothing here knows that anything dies.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

NAMES = ("ants", "bees", "cats", "dogs", "eels")
ROWS = 200
"""Of each table: together 1,000 keys, all of them hot."""
OWNERS = 40

TABLES = (
    "".join(
        f"create table {name} (id int primary key, owner int not null, amount int not null,"
        f" version int not null); alter table {name} replica identity full;"
        for name in NAMES
    )
    + """
create table derived_totals (
  tab text, owner int, rows bigint not null, amount bigint not null, primary key (tab, owner)
);
create table derived_seen (
  seq bigint generated always as identity primary key,
  handler text not null, tab text not null, id int not null, type text not null, version int not null,
  owner int, old_owner int, lsn bigint not null, ordinal bigint not null, attempt int not null
);
create table derived_commits (id bigint primary key);
"""
)
"""`derived_commits` is the writers' own: a commit of which nobody heard is looked up there."""

on = Handlers()


def _totals(name: str) -> Callable[[list[int], AsyncSession], Coroutine[Any, Any, None]]:
    async def totals(owners: list[int], session: AsyncSession) -> None:
        await session.execute(
            text(
                "insert into derived_totals (tab, owner, rows, amount)"
                " select :tab, o, count(t.id), coalesce(sum(t.amount), 0)"
                f" from unnest(cast(:owners as int[])) o left join {name} t on t.owner = o group by o"
                " on conflict (tab, owner) do update set rows = excluded.rows, amount = excluded.amount"
            ),
            {"tab": name, "owners": owners},
        )

    return totals


for _name in NAMES:
    on.derive(f"public.{_name}", by="owner", name=f"totals_{_name}")(_totals(_name))


async def _note(handler: str, changes: list[Change], session: AsyncSession) -> None:
    rows = []
    for change in changes:
        row = change.record or change.old_record
        assert row is not None
        old = change.old_record
        rows.append(
            {
                "handler": handler,
                "tab": change.table,
                "id": row["id"],
                "type": change.type,
                "version": row["version"],
                "owner": change.record["owner"] if change.record is not None else None,
                "old_owner": old["owner"] if old is not None else None,
                "lsn": change.position.lsn,
                "ordinal": change.position.ordinal,
                "attempt": change.attempt,
            }
        )
    await session.execute(
        text(
            "insert into derived_seen"
            " (handler, tab, id, type, version, owner, old_owner, lsn, ordinal, attempt) values"
            " (:handler, :tab, :id, :type, :version, :owner, :old_owner, :lsn, :ordinal, :attempt)"
        ),
        rows,
    )


@on.change("public.ants", name="by_row")
@on.change("public.bees", name="by_row")
@on.change("public.cats", name="by_row")
@on.change("public.dogs", name="by_row")
@on.change("public.eels", name="by_row")
async def by_row(change: Change, session: AsyncSession) -> None:
    """One change at a time, in the order of each row."""
    await _note("by_row", [change], session)


@on.change("public.ants", lane_key="owner", batch=20, name="by_owner")
@on.change("public.bees", lane_key="owner", batch=20, name="by_owner")
@on.change("public.cats", lane_key="owner", batch=20, name="by_owner")
@on.change("public.dogs", lane_key="owner", batch=20, name="by_owner")
@on.change("public.eels", lane_key="owner", batch=20, name="by_owner")
async def by_owner(changes: list[Change], session: AsyncSession) -> None:
    """Several at a time, in the order of each owner; a row that changes hands belongs to two."""
    await _note("by_owner", changes, session)


CHANGE_HANDLERS = ("by_row", "by_owner")

DIFFERENCES = (
    "select count(*) from ("
    + " union all ".join(
        f"select '{name}' as tab, owner, count(*) as rows, sum(amount) as amount from {name} group by owner"
        for name in NAMES
    )
    + ") truth full join (select tab, owner, rows, amount from derived_totals where rows > 0) derived"
    " on truth = derived where truth is null or derived is null"
)
"""How many totals are not what they should be."""

DISORDER = """
select count(*) from (
  select (lsn, ordinal) < lag((lsn, ordinal)) over (partition by handler, tab, key order by seq) as back
  from derived_seen, lateral (
    select id as key where handler = 'by_row'
    union select owner where handler = 'by_owner' and owner is not null
    union select old_owner where handler = 'by_owner' and old_owner is not null
  ) keys
) seen where back
"""
"""How often a handler was given a change of a key after a later one of that key."""
