"""Idempotency keys: one for each change, the same for every attempt, another in another history."""

from dataclasses import dataclass, field

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item, raw_change
from worker import Change, Context, Handlers
from worker.change import Position
from worker.reading import record

FAR = 10**9


@dataclass
class Outside:
    """What a handler has sent there, by the note of its change: the key of each attempt."""

    keys: dict[str, list[str | None]] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)


@pytest.fixture
async def outside(at: Bench) -> Outside:
    """Load a handler that calls it."""
    sent, on = Outside(), Handlers()

    @on.change("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession, context: Context) -> None:
        assert change.record is not None
        note = change.record["note"]
        sent.keys.setdefault(note, []).append(context.idempotency_key)
        if note in sent.refuses:
            raise ConnectionError

    await at.load(on)
    return sent


async def restore(at: Bench, to: Position) -> None:
    """Let the database's history be another one, as the listener does when it finds that."""
    async with at.engine.begin() as connection:
        await record.restart_at(connection, to.lsn, anew=True, new_history=True)
    await at.begin()


def put_at(at: Bench, position: Position, note: str, grp: int = 1) -> None:
    raw = msgspec.structs.replace(raw_change("items", item(1, grp, note), None), position=position)
    at.journal.add(raw, at.router.route(raw).matched, 1.0)


async def test_the_same_position_in_another_history_has_another_key(at: Bench, outside: Outside) -> None:
    start = at.writer.last
    position = Position(start.lsn + FAR, 3)
    put_at(at, position, "before")
    await at.journal.flush()
    await at.settle(at.drain("one"))
    await restore(at, start)
    put_at(at, position, "after")
    await at.journal.flush()
    await at.settle(at.drain("one"))
    (before,), (after,) = outside.keys["before"], outside.keys["after"]
    assert before is not None
    assert after is not None
    assert before != after
    assert before.split(":")[1:] == after.split(":")[1:] == ["one", str(position)]


async def test_an_attempt_after_a_restore_has_the_key_of_the_first(at: Bench, outside: Outside) -> None:
    outside.refuses = {"early"}
    start, drain = at.writer.last, at.drain("one")
    position = Position(start.lsn + FAR, 0)
    put_at(at, position, "early")
    await at.journal.flush()
    await drain.run(at.lane_of("one", item(1, 1)))
    await restore(at, start)
    outside.refuses = set()
    put_at(at, position, "late", grp=2)
    await at.journal.flush()
    await at.settle(at.drain("one"))
    assert len(outside.keys["early"]) > 1
    assert len(set(outside.keys["early"])) == 1
    assert set(outside.keys["late"]).isdisjoint(outside.keys["early"])
