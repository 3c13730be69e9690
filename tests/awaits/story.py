"""What is written in a round, and what handlers must have been given of it.

The same every time: inserts, updates, rows that change hands, deletes, a change that fails until it is
mended, a TRUNCATE, a backfill. The `version` of a row names the change.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import asyncpg

POISONED = 3


class Note(NamedTuple):
    """A change, as a handler writes it down."""

    type: str
    id: int | None
    version: int | None
    owner: int | None
    old_owner: int | None


class Story:
    """Writes orders, and knows what it has committed."""

    def __init__(self, db: asyncpg.Connection) -> None:
        self.db = db
        self.notes: list[Note] = []
        self._rows: dict[int, int] = {}
        self._version = 0

    # What is done in one transaction is noted when it has committed.

    async def insert(self, *rows: tuple[int, int]) -> None:
        """Insert rows, each an id and an owner, in one transaction."""
        notes = []
        async with self.db.transaction():
            for id_, owner in rows:
                self._version += 1
                await self.db.execute(
                    "insert into orders values ($1, $2, $3, $4)", id_, owner, id_ * 10, self._version
                )
                notes.append(Note("INSERT", id_, self._version, owner, None))
        self._rows |= dict(rows)
        self.notes += notes

    async def update(self, *rows: tuple[int, int]) -> None:
        """Update rows, giving each an owner, in one transaction."""
        notes = []
        async with self.db.transaction():
            for id_, owner in rows:
                self._version += 1
                await self.db.execute(
                    "update orders set owner = $2, amount = amount + 1, version = $3 where id = $1",
                    id_,
                    owner,
                    self._version,
                )
                notes.append(Note("UPDATE", id_, self._version, owner, self._rows[id_]))
                self._rows[id_] = owner
        self.notes += notes

    async def delete(self, id_: int) -> None:
        """Delete a row."""
        version = await self.db.fetchval("delete from orders where id = $1 returning version", id_)
        self.notes.append(Note("DELETE", id_, version, None, self._rows.pop(id_)))

    async def truncate(self) -> None:
        """Empty the table."""
        await self.db.execute("truncate orders")
        self._rows.clear()
        self.notes.append(Note("TRUNCATE", None, None, None, None))


Chapter = Callable[[Story], Awaitable[None]]


async def opening(story: Story) -> None:
    """Before anybody is there to see it."""
    await story.insert(*[(id_, id_ % 4) for id_ in range(1, 6)])
    await story.update((1, 2), (2, 3), (5, 1))


async def busy(story: Story) -> None:
    """Changes of each sort; one fails, and others wait behind it."""
    await story.db.execute(f"insert into derived_poison values ({POISONED})")
    await story.update((4, 1))
    await story.update((POISONED, 3))
    await story.update((POISONED, 1), (4, 1))
    await story.delete(5)
    await story.update((1, 0))
    await story.update((1, 2))


async def mended(story: Story) -> None:
    """The failure is mended, the table emptied and filled again; a backfill is asked for."""
    await story.update((POISONED, 2))
    await story.db.execute("delete from derived_poison")
    await story.db.execute(
        "insert into tailrace.backfills (handler, schema_name, table_name)"
        " values ('totals', 'public', 'orders') on conflict do nothing"
    )
    await story.truncate()
    await story.insert((1, 1), (2, 2))
    await story.update((1, 2))


async def epilogue(story: Story) -> None:
    """A little more, wherever the round has got to; no row is left, and the next one begins with nothing."""
    await story.db.execute("delete from derived_poison")
    await story.insert((6, 3))
    await story.delete(1)
    await story.update((2, 1))
    await story.truncate()


CHAPTERS: tuple[Chapter, ...] = (opening, busy, mended)
"""One after the other, each when the one before has been applied."""


def misfit(story: list[Note], seen: list[Note], handler: str) -> str | None:
    """Tell where what a handler was given differs from what was committed; None where it does not.

    Of each key, which is the row or the owner, it must be the same changes in the same order.
    """
    if handler == "by_row":
        keys = {note.id for note in [*story, *seen]}
    else:
        keys = {key for note in [*story, *seen] for key in (note.owner, note.old_owner)}
    for key in sorted(keys - {None}):

        def concerns(note: Note, key: int | None = key) -> bool:
            mine = (note.id,) if handler == "by_row" else (note.owner, note.old_owner)
            return note.type == "TRUNCATE" or key in mine

        expected, found = list(filter(concerns, story)), list(filter(concerns, seen))
        if expected != found:
            return f"{handler} was given of {key}: {_short(found)}, not {_short(expected)}"
    return None


def _short(notes: list[Note]) -> list[str]:
    return [f"{note.type.lower()} {note.version}" if note.version else note.type for note in notes]
