"""One run of chaos: writers write, things die, and in the end everything is accounted for.

Raises AssertionError with the reason where it is not. What is measured here is not speed.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from tests.chaos.faults import Hands, Kept, Planned, plan
from tests.chaos.tables import CHANGE_HANDLERS, DIFFERENCES, DISORDER, TABLES
from tests.chaos.writing import Note, Row, Writer
from tests.stack import Project, project, servers

WRITERS = 4
WORKERS = 2


@dataclass
class Outcome:
    """What a run was."""

    planned: list[Planned]
    committed: int = 0
    commits_of_unknown_fate: int = 0
    settled_after: float = 0.0
    """Seconds from the last commit until everything was applied."""
    died: list[str] = field(default_factory=list)
    """Processes that ended although nobody had killed them; they were started again."""


async def chaos(
    folder: Path,
    *,
    seed: int,
    seconds: float,
    rate: float = 400.0,
    every: float = 4.0,
    settling: float = 300.0,
    tell: Callable[[str], None] = lambda _: None,
    logs: Path | None = None,
) -> Outcome:
    """Run it on servers of its own.

    Args:
        folder: where the servers keep their files.
        seed: of the plan and of all that is written.
        seconds: how long is written and broken.
        rate: changes a second, at most.
        every: seconds between faults, about.
        settling: seconds that may pass afterwards until everything is applied.
        tell: is given lines for people.
        logs: where to write down what the processes said, a file for each.

    Raises:
        AssertionError: something was lost, doubled, out of order or not accounted for.
    """
    outcome = Outcome(plan(seed, seconds, every))
    for one in outcome.planned:
        tell(str(one))
    async with (
        servers(folder) as own,
        project(own, TABLES, "tests.chaos.tables", WORKER_DELIVERY="proven") as made,
    ):
        try:
            async with _processes(made, outcome) as (listener, workers):
                writers = [
                    Writer(made.database_url, seed, number, WRITERS, rate / WRITERS)
                    for number in range(WRITERS)
                ]
                await _break(made, writers, Hands(made, listener, workers, seed), outcome.planned)
                outcome.committed = sum(writer.committed for writer in writers)
                outcome.commits_of_unknown_fate = sum(writer.unknown for writer in writers)
                tell(f"{outcome.committed} changes committed")
                ended = time.monotonic()
                await made.reconnect()
                await settled(made, listener, outcome.committed, settling)
                outcome.settled_after = time.monotonic() - ended
                await accounted(made, writers)
        finally:
            _write_logs(made, logs)
            await _drop_slot(made)
    return outcome


@asynccontextmanager
async def _processes(made: Project, outcome: Outcome) -> AsyncIterator[tuple[Kept, list[Kept]]]:
    listener, workers = Kept(made, "listener"), [Kept(made, "worker") for _ in range(WORKERS)]
    everybody = [listener, *workers]
    async with asyncio.TaskGroup() as group:
        for one in everybody:
            group.create_task(one.run(), name=f"chaos: {one.role}")
        try:
            # The very first start begins at the present: what is written before is not handled.
            await (await listener.up()).said("listening")
            yield listener, workers
        finally:
            codes = [await one.stop() for one in everybody]
            outcome.died += [line for one in everybody for line in one.died]
    said = [one.current.lines[-5:] for one, code in zip(everybody, codes, strict=True) if code != 0]
    assert codes == [0] * len(everybody), f"exit codes at the end: {codes}, {said}"


async def _break(made: Project, writers: list[Writer], hands: Hands, planned: list[Planned]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.write(), name="chaos: writer")
            await hands.carry_out(planned)
            for writer in writers:
                writer.stop()
    finally:
        await hands.close()


async def settled(made: Project, listener: Kept, committed: int, seconds: float) -> None:
    """Wait until every change has been handled and nothing is queued or held."""
    deadline = time.monotonic() + seconds
    for handler in CHANGE_HANDLERS:
        count = f"select count(*) >= {committed} from derived_seen where handler = '{handler}'"
        await made.until(count, value=True, seconds=max(1.0, deadline - time.monotonic()))
    await made.until(DIFFERENCES, 0, max(1.0, deadline - time.monotonic()))
    while True:
        process = await listener.up()
        status = (await made.get(process, "/status")).json()
        open_ = {
            name: {word: handler[word] for word in ("queued", "held", "parked", "dead") if handler[word] != 0}
            for name, handler in status["handlers"].items()
        }
        if status["ready"] and not any(open_.values()):
            return
        assert time.monotonic() < deadline, f"{open_} {status['reasons']} {process.lines[-5:]}"
        await asyncio.sleep(0.05)


async def accounted(made: Project, writers: list[Writer]) -> None:
    """See that each handler was given each change once, in order, and that nobody speaks of a gap."""
    history = {row: notes for writer in writers for row, notes in writer.history.items()}
    for handler in CHANGE_HANDLERS:
        seen = await _seen(made.db, handler)
        assert seen.keys() == history.keys(), f"{handler}: rows {seen.keys() ^ history.keys()}"
        for row, notes in history.items():
            assert seen[row] == notes, f"{handler}, {row}: {_first_difference(seen[row], notes)}"
    disorder = await made.db.fetchval(DISORDER)
    assert disorder == 0, f"{disorder} changes were handled after a later one of their key"
    gaps = [dict(gap) for gap in await made.db.fetch("select since, until, cause from tailrace.gaps")]
    assert not gaps, gaps
    assert await made.db.fetchval("select count(*) from tailrace.held") == 0


async def _seen(db: asyncpg.Connection, handler: str) -> dict[Row, list[Note]]:
    """Read what a handler was given of each row, by position: by time, only the order of a lane key holds."""
    found: dict[Row, list[Note]] = defaultdict(list)
    query = "select tab, id, type, version from derived_seen where handler = $1 order by lsn, ordinal, seq"
    for tab, id_, kind, version in await db.fetch(query, handler):
        found[tab, id_].append((kind, version))
    return dict(found)


def _first_difference(seen: list[Note], notes: list[Note]) -> str:
    at = next(
        (at for at, (one, other) in enumerate(zip(seen, notes, strict=False)) if one != other),
        min(len(seen), len(notes)),
    )
    there = f"at {at} of {len(notes)} committed and {len(seen)} seen"
    return f"{there}: {seen[at : at + 4]}, not {notes[at : at + 4]}"


def _write_logs(made: Project, folder: Path | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, process in enumerate(made.processes):
        (folder / f"{number:03}-{process.name}.log").write_text(f"{process.text}\n")


async def _drop_slot(made: Project) -> None:
    """Let go of the database: it cannot be dropped while it has a slot."""
    for process in made.processes:
        await process.kill()
    if made.db.is_closed():
        await made.reconnect()
    await made.until("select count(*) from pg_replication_slots where slot_name = 'tailrace' and active", 0)
    await made.db.execute(
        "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
        " where slot_name = 'tailrace' and database = current_database()"
    )
