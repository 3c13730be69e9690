"""Whatever people decide while changes fail and connections are cut: order by key, and each change once."""

import contextlib
import os
import random
from collections import defaultdict
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, GiveUp, Handlers
from worker.asked import Operator, Which
from worker.draining.drain import Drain
from worker.errors import Refused
from worker.lanes import Lane
from worker.operating import Operations

ANNA = Operator("anna", "command")
KEYS = range(1, 6)
SEEDS = int(os.environ.get("TEST_SEEDS", "6"))
WRITE = text("insert into derived_log (handler, id, note) values (:handler, :id, :source)")


class World:
    """Two handlers that fail at random, and people who decide at random."""

    def __init__(self, at: Bench, seed: int) -> None:
        self.at = at
        self.random = random.Random(seed)
        self.share_that_fails = 0.3
        self.on = Handlers()
        self.put: dict[int, set[int]] = {}
        """Change -> its keys."""
        self.letters: dict[int, int] = {}
        """Dead letter -> its change."""

        @self.on.change("items", name="goes-on", lane_key="grp")
        async def goes_on(change: Change, session: AsyncSession) -> None:
            await self.meet("goes-on", change, session)

        @self.on.change("items", name="halts", lane_key="grp", after="halt")
        async def halts(change: Change, session: AsyncSession) -> None:
            await self.meet("halts", change, session)

    async def meet(self, handler: str, change: Change, session: AsyncSession) -> None:
        assert change.record is not None
        await session.execute(WRITE, {"handler": handler, "id": change.record["id"], "source": change.source})
        if self.random.random() < self.share_that_fails:
            raise self.random.choice((GiveUp("never"), ValueError("not now")))

    async def _wake(self, _: Any) -> None: ...

    async def run(self, steps: int) -> None:
        await self.at.load(self.on)
        self.desk = Operations(self.at.engine, lambda: self.at.handlers, self._wake)
        drains = [self.at.drain(name, max_attempts=3) for name in ("goes-on", "halts")]
        for _ in range(steps):
            step = self.random.choice(
                (self._write, self._write, self._pass, self._pass, self._decide, self._pause)
            )
            if step == self._write or self.random.random() < 0.7:
                await step(drains)
                continue
            with self.at.killed_at(self.random.randrange(1, 25)), contextlib.suppress(DBAPIError):
                await step(drains)
        await self._mend(drains)

    async def _write(self, _: list[Drain]) -> None:
        for _n in range(self.random.randrange(1, 5)):
            number, key, other = len(self.put) + 1, self.random.choice(KEYS), self.random.choice(KEYS)
            moves = self.random.random() < 0.2
            self.put[number] = {key, other} if moves else {key}
            await self.at.put("items", item(number, key), item(number, other) if moves else None)

    async def _pass(self, drains: list[Drain]) -> None:
        await self.at.make_due()
        drain = self.random.choice(drains)
        for number in range(self.at.lane_count):
            await drain.run(Lane(drain.handler.name, number))

    async def _decide(self, _: list[Drain]) -> None:
        dead = await self.desk.find(Which())
        for one in self.random.sample(dead, min(len(dead), self.random.randrange(1, 4))):
            self.letters[one["id"]] = one["key"][0]
            if self.random.random() < 0.8:
                await self.desk.redrive(ANNA, one["id"])
            else:
                await self.desk.discard(ANNA, one["id"])

    async def _pause(self, drains: list[Drain]) -> None:
        name, paused = self.random.choice(drains).handler.name, self.random.random() < 0.4
        key = self.random.choice((None, *map(str, KEYS)))
        try:
            await self.desk.pause(ANNA, name, key, paused=paused)
        except Refused:  # the key was not paused
            assert not paused

    async def _mend(self, drains: list[Drain]) -> None:
        """Let everything that waits be applied."""
        self.share_that_fails = 0.0
        for drain in drains:
            (told,) = await self.desk.lanes(drain.handler.name)
            for key in (None, *told["paused_keys"]):
                await self.desk.pause(ANNA, drain.handler.name, key, paused=False)
        await self.desk.decide(ANNA, "redrive", Which(), dry_run=False)
        await self.at.settle(*drains)

    async def check(self) -> None:
        applied: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for handler, number, source in await self.at.db.fetch(
            "select handler, id, note from derived_log order by n"
        ):
            applied[handler].append((number, source))
        discarded: dict[str, set[int]] = defaultdict(set)
        for handler, letter in await self.at.db.fetch(
            "select handler, dead_letter from tailrace.audit where action = 'discard'"
        ):
            discarded[handler].add(self.letters[letter])
        for name in ("goes-on", "halts"):
            numbers = [number for number, _ in applied[name]]
            assert sorted(numbers) == sorted(self.put.keys() - discarded[name]), name
            for key in KEYS:
                of_key = [one for one in applied[name] if key in self.put[one[0]]]
                # Who halts keeps the order whatever is decided; else what was redriven is excepted.
                kept = [one[0] for one in of_key if name == "halts" or one[1] != "redrive"]
                assert kept == sorted(kept), (name, key)
        assert await self.at.holding_is_true()
        assert await self.at.rows("held") == []
        assert (await self.at.counters())[2] == 0


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_is_decided_each_change_is_applied_once_and_each_key_in_order(
    at: Bench, seed: int
) -> None:
    world = World(at, seed)
    await world.run(60)
    await world.check()
