"""Random changes, random passes, random deaths: in the end everything is applied once, per key in order."""

import os
import random
from collections import Counter
from functools import partial

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, at_once, item
from worker import Change, Handlers, RetryLater
from worker.draining.drain import Drain
from worker.lanes import Lane

CHANGES = 60
ROUNDS = 40
SEEDS = int(os.environ.get("TEST_SEEDS", "6"))
COUNT = text("select count(*) from items where grp = :key")
STORE = text("insert into derived_sums values (:key, :n) on conflict (grp) do update set n = excluded.n")


class Model:
    """What handlers should have done, and how often they are to fail before."""

    def __init__(self, rng: random.Random, groups: list[int]) -> None:
        self.rng = rng
        self.groups = groups
        self.rows: dict[int, int] = {}
        self.keys: dict[str, set[int]] = {}
        self.failures: Counter[str] = Counter()
        self.totals: Counter[int] = Counter()

    async def change(self, at: Bench, note: str) -> None:
        """Insert, update, move or delete a row, in the table as in the lanes."""
        id_, old = self.rng.randrange(8), None
        if id_ in self.rows:
            old = item(id_, self.rows.pop(id_), note)
        new = None
        if old is None or self.rng.random() < 0.8:
            new = item(id_, self.rng.choice(self.groups), note)
            self.rows[id_] = new["grp"]
        self.keys[note] = {one["grp"] for one in (old, new) if one is not None}
        if self.rng.random() < 0.12:
            self.failures[note] = self.rng.randrange(1, 4)
        await at.db.execute("delete from items where id = $1", id_)
        if new is not None:
            await at.db.execute("insert into items values ($1, $2, $3)", id_, new["grp"], note)
        at.take("items", new, old)


def handlers(failures: Counter[str]) -> Handlers:
    on = Handlers()

    @on.change("items", name="log", lane_key="grp")
    async def log(change: Change, session: AsyncSession) -> None:
        row = change.record or change.old_record
        assert row is not None
        values = {"position": str(change.position), "id": row["id"], "note": row["note"]}
        await session.execute(
            text("insert into derived_log (position, id, note) values (:position, :id, :note)"), values
        )
        if failures[row["note"]] > 0:
            failures[row["note"]] -= 1
            raise RetryLater

    @on.derive("items", by="grp", name="sums")
    async def sums(keys: list[int], session: AsyncSession) -> None:
        for key in keys:
            found = await session.execute(COUNT, {"key": key})
            await session.execute(STORE, {"key": key, "n": found.scalar_one()})
        if failures["sums"] > 0:
            failures["sums"] -= 1
            raise ValueError("not now")

    return on


async def some_passes(at: Bench, rng: random.Random, drains: list[Drain]) -> None:
    chosen = [(rng.choice(drains), rng.randrange(at.lane_count)) for _ in range(rng.randrange(1, 4))]
    passes = [partial(drain.run, Lane(drain.handler.name, number)) for drain, number in chosen]
    if rng.random() < 0.4:
        drain = rng.choice(drains)
        numbers = rng.sample(range(at.lane_count), rng.randrange(1, at.lane_count + 1))
        passes.append(partial(drain.run_several, await at.told(drain.handler.name, numbers)))
    if rng.random() < 0.25:
        with at.killed_at(rng.randrange(1, 15)):
            await at_once(*passes)
    else:
        await at_once(*passes)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_everything_is_applied_once_and_per_key_in_order(
    at: Bench, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    if seed % 2:
        # As if every payload were too large for Redis.
        monkeypatch.setattr("worker.reading.journal.LARGE_BYTES", 0)
    failures: Counter[str] = Counter()
    await at.db.execute("create table derived_sums (grp integer primary key, n bigint)")
    await at.load(handlers(failures))
    model = Model(rng, at.groups("log") + [rng.randrange(1000, 2000) for _ in range(3)])
    model.failures = failures
    drains = [at.drain(name, batch=rng.choice([2, 10, 500])) for name in ("log", "sums") for _ in range(2)]
    written = 0
    for _ in range(ROUNDS):
        if written < CHANGES and rng.random() < 0.5:
            for _ in range(rng.randrange(1, 8)):
                await model.change(at, str(written))
                written += 1
            failures["sums"] = rng.randrange(0, 2)
            await at.journal.flush()
        if rng.random() < 0.2:
            await at.make_due()
            await at.journal.sweep()
        await some_passes(at, rng, drains)
        assert await at.holding_is_true()
    await at.settle(*drains)

    log = await at.log("note")
    assert Counter(log) == Counter(str(n) for n in range(written))
    for key in model.groups:
        expected = [note for note, keys in model.keys.items() if key in keys]
        assert [note for note in log if key in model.keys[note]] == expected, f"order of {key}"
    totals = {row["grp"]: row["n"] for row in await at.db.fetch("select * from derived_sums where n > 0")}
    assert totals == dict(Counter(model.rows.values()))
    applied, waiting, queued = await at.counters()
    # Each handler counts a change once, however many lanes it stands in.
    assert (applied, waiting, queued) == (2 * written, 0, 0)
    assert await at.count("tailrace.gaps") == 0
    await at.journal.sweep()
    assert await at.count("tailrace.payloads") == 0
