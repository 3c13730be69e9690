"""Writers that know what they have committed, although the database dies under them.

Each writer has rows of its own, so that it knows their histories; owners are everybody's, as are totals.
"""

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import asyncpg

from tests.chaos.tables import NAMES, OWNERS, ROWS

MOVES = 0.1
"""Share of the updates that change the lane key."""

Row = tuple[str, int]
"""Table and id."""
Note = tuple[str, int]
"""Type and version."""

# Not every error of Postgres: a wrong statement of ours must not pass for a dead server.
_AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    OSError,
    TimeoutError,
)


class _RolledBackError(Exception):
    """This transaction was not meant to commit."""


class Draft:
    """What one transaction does to a writer's rows, until it is known whether it was committed."""

    def __init__(self, alive: dict[Row, int]) -> None:
        self.alive = dict(alive)
        self.notes: list[tuple[Row, Note]] = []

    def note(self, row: Row, kind: str, version: int) -> None:
        """Add a change."""
        self.notes.append((row, (kind, version)))
        if kind == "DELETE":
            del self.alive[row]
        else:
            self.alive[row] = version


class Writer:
    """Commits transactions of random size to its own rows until it is told to stop.

    Args:
        url: of the database.
        seed: of everything it does.
        number: which of the writers it is.
        writers: how many there are.
        rate: changes a second, at most.
    """

    def __init__(self, url: str, seed: int, number: int, writers: int, rate: float) -> None:
        self._url = url
        self._random = random.Random(f"{seed}/{number}")
        self._rate = rate
        self._rows = [(name, id_) for name in NAMES for id_ in range(ROWS) if id_ % writers == number]
        self._alive: dict[Row, int] = {}
        self._version = 0
        self._commit = number
        self._step = writers
        self._stopped = False
        self.history: dict[Row, list[Note]] = defaultdict(list)
        self.committed = 0
        self.unknown = 0
        """Commits that had to be looked up."""

    def stop(self) -> None:
        """Begin no further transaction."""
        self._stopped = True

    async def write(self) -> None:
        """Write until stopped."""
        while not self._stopped:
            with contextlib.suppress(*_AWAY):
                async with self._connection() as db:
                    await self._write(db)

    async def _write(self, db: asyncpg.Connection) -> None:
        began, before = time.monotonic(), self.committed
        while not self._stopped:
            await self._transaction(db)
            ahead = (self.committed - before) / self._rate - (time.monotonic() - began)
            if ahead > 0:
                await asyncio.sleep(ahead)  # the load has a rate; nothing is waited for

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        while True:
            try:
                db = await asyncpg.connect(self._url)
                break
            except _AWAY:
                await asyncio.sleep(0.05)
        try:
            yield db
        finally:
            db.terminate()

    async def _transaction(self, db: asyncpg.Connection) -> None:
        self._commit += self._step
        draft, number = Draft(self._alive), self._commit
        size = self._random.choice((1, 1, 1, 2, 3, 8, 20))
        fails = self._random.random() < 0.03
        try:
            async with db.transaction():
                await db.execute("insert into derived_commits (id) values ($1)", number)
                for _ in range(size):
                    await self._operation(db, draft)
                if fails:
                    raise _RolledBackError  # noqa: TRY301 - leaving the block so is what rolls back
        except _RolledBackError:
            return
        except _AWAY:
            async with self._connection() as other:
                found = await other.fetchval("select 1 from derived_commits where id = $1", number)
            self.unknown += 1
            if found is not None:
                self._keep(draft)
            raise
        self._keep(draft)

    def _keep(self, draft: Draft) -> None:
        self._alive = draft.alive
        for row, note in draft.notes:
            self.history[row].append(note)
        self.committed += len(draft.notes)

    async def _operation(self, db: asyncpg.Connection, draft: Draft) -> None:
        chance = self._random.random()
        if chance < 0.05:
            await self._in_vain(db)
        elif chance < 0.15:
            await self._many(db, draft)
        else:
            await self._one(db, draft)

    async def _one(self, db: asyncpg.Connection, draft: Draft) -> None:
        row = table, id_ = self._random.choice(self._rows)
        owner, amount = self._random.randrange(OWNERS), self._random.randrange(1000)
        self._version += 1
        if row not in draft.alive:
            await db.execute(
                f"insert into {table} (id, owner, amount, version) values ($1, $2, $3, $4)",
                id_,
                owner,
                amount,
                self._version,
            )
            draft.note(row, "INSERT", self._version)
        elif self._random.random() < 0.15:
            await db.execute(f"delete from {table} where id = $1", id_)
            draft.note(row, "DELETE", draft.alive[row])
        else:
            # What changes hands belongs to two lanes, which have to meet: few rows do, in most shops.
            moves = ", owner = $4" if self._random.random() < MOVES else ""
            await db.execute(
                f"update {table} set amount = $2, version = $3{moves} where id = $1",
                *((id_, amount, self._version, owner) if moves else (id_, amount, self._version)),
            )
            draft.note(row, "UPDATE", self._version)

    async def _many(self, db: asyncpg.Connection, draft: Draft) -> None:
        """Change many rows in one statement."""
        table = self._random.choice(NAMES)
        mine = sorted(id_ for name, id_ in draft.alive if name == table)
        ids = self._random.sample(mine, min(len(mine), 15))
        self._version += 1
        await db.execute(
            f"update {table} set amount = amount + 1, version = $2, owner = (owner + $3) % {OWNERS}"
            " where id = any($1)",
            ids,
            self._version,
            int(self._random.random() < MOVES),
        )
        for id_ in ids:
            draft.note((table, id_), "UPDATE", self._version)

    async def _in_vain(self, db: asyncpg.Connection) -> None:
        """Change a row and take it back to a savepoint: nobody may ever hear of it."""
        table, id_ = self._random.choice(self._rows)
        with contextlib.suppress(_RolledBackError):
            async with db.transaction():
                await db.execute(f"update {table} set version = -1 where id = $1", id_)
                raise _RolledBackError
