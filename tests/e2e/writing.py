"""Writers of orders: they know what they have committed, whatever happens to anybody else."""

import asyncio
import random
from collections import defaultdict

import asyncpg

from tests.stack import Project


class Writer:
    """Writes single-row commits to a number of orders and remembers each order's history."""

    def __init__(self, project: Project, seed: int, *, keys: int = 200) -> None:
        self._url = project.database_url
        self._random = random.Random(seed)
        self._keys = keys
        self._alive: dict[int, int] = {}
        self._version = 0
        self.history: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self.committed = 0

    async def write(self, changes: int, *, pace: float = 0.0) -> None:
        """Commit so many changes, one row each."""
        db = await asyncpg.connect(self._url)
        try:
            for _ in range(changes):
                await self._one(db)
                if pace:
                    await asyncio.sleep(pace)
        finally:
            await db.close()

    async def _one(self, db: asyncpg.Connection) -> None:
        number = self._random.randrange(self._keys)
        self._version += 1
        customer = self._random.randrange(40)
        if number not in self._alive:
            await db.execute(
                "insert into orders (id, customer_id, amount, version) values ($1, $2, $3::int, $3::int)",
                number,
                customer,
                self._version,
            )
            self._note(number, "INSERT", self._version)
        elif self._random.random() < 0.1:
            await db.execute("delete from orders where id = $1", number)
            self.history[number].append(("DELETE", self._alive.pop(number)))
            self.committed += 1
        else:
            await db.execute(
                "update orders set customer_id = $2, version = $3::int, amount = $3::int where id = $1",
                number,
                customer,
                self._version,
            )
            self._note(number, "UPDATE", self._version)

    def _note(self, number: int, kind: str, version: int) -> None:
        self._alive[number] = version
        self.history[number].append((kind, version))
        self.committed += 1


async def logged(db: asyncpg.Connection) -> dict[int, list[tuple[str, int]]]:
    """Read what the change handler has written down, for each order, in the order of its commits."""
    found: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for row in await db.fetch("select order_id, type, version from derived_log order by seq"):
        found[row[0]].append((row[1], row[2]))
    return found
