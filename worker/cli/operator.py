"""What the commands for operators do: `dead-letters …` and `lanes …`.

Each returns an exit code: 1 with one line for each refusal, 2 for bad usage. Values of rows are printed, for
whoever may use the command may read the database; they are never logged.
"""

import asyncio
import contextlib
import getpass
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import asyncpg
import msgspec
from sqlalchemy.exc import SQLAlchemyError

from config.logging import configure_logging
from config.settings import Settings, load_settings
from worker import loader
from worker.asked import Operator, Which, which
from worker.cli import printing
from worker.cli.progress import progress
from worker.database import explain, make_engine
from worker.errors import ConfigurationError, Refused
from worker.lanes import Lane
from worker.operating import Operations

FINE, PROBLEMS = 0, 1
_record = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


class Wanted(NamedTuple):
    """Which dead letters a person means, as typed."""

    ids: Sequence[int] = ()
    handler: str | None = None
    table: str | None = None
    error_class: str | None = None
    since: str | None = None
    until: str | None = None

    def read(self) -> Which:
        """Read it.

        Raises:
            ConfigurationError: a time that is none.
        """
        try:
            return which(**self._asdict())
        except Refused as error:
            raise ConfigurationError([f"--{error}"]) from None


class Decision(NamedTuple):
    """What to do with them, as typed."""

    action: Literal["redrive", "discard"]
    everything: bool
    dry_run: bool
    by: str | None
    record: str | None = None
    record_file: Path | None = None


def list_dead_letters(wanted: Wanted, limit: int, *, as_json: bool) -> int:
    """List dead letters."""
    meant = wanted.read()

    async def ask(operations: Operations) -> int:
        found = await operations.find(meant, most=limit + 1)
        printing.show_dead_letters(found[:limit], as_json=as_json)
        if len(found) > limit:
            printing.show_problem(f"there are more than the {limit} shown: name some, or raise --limit")
        return FINE

    return with_operations(ask)


def show_dead_letter(id_: int, *, as_json: bool) -> int:
    """Show all of one."""

    async def ask(operations: Operations) -> int:
        printing.show_dead_letter(await operations.show(id_), as_json=as_json)
        return FINE

    return with_operations(ask)


def decide(wanted: Wanted, decision: Decision, *, as_json: bool) -> int:
    """Redrive or discard those that are meant."""
    meant = wanted.read()
    if meant.is_all and not decision.everything:
        raise ConfigurationError(["name dead letters by id or by an option; --all means every one of them"])
    record = _edit(decision)
    if record is not None and len(wanted.ids) != 1:
        raise ConfigurationError(["an edited record is for one dead letter: name its id"])
    operator = who(decision.by)

    async def do(operations: Operations) -> int:
        if record is not None and not decision.dry_run:
            told = [await operations.redrive(operator, wanted.ids[0], record)]
        else:
            verb = {"redrive": "redriving", "discard": "discarding"}[decision.action]
            with progress(verb) as tell:
                told = await operations.decide(
                    operator, decision.action, meant, dry_run=decision.dry_run, progress=tell
                )
        printing.show_dead_letters(told, as_json=as_json)
        refused = [one["refused"] for one in told if "refused" in one]
        for reason in refused:
            printing.show_problem(reason)
        return PROBLEMS if refused else FINE

    return with_operations(do)


def list_lanes(handler: str | None, *, as_json: bool) -> int:
    """List the handlers' lanes: what is paused, and what waits."""

    async def ask(operations: Operations) -> int:
        printing.show_lanes(await operations.lanes(handler), as_json=as_json)
        return FINE

    return with_operations(ask)


def pause(handler: str, lane_key: str | None, by: str | None, *, paused: bool, as_json: bool) -> int:
    """Pause a handler or one lane key of it, or let it go on."""
    operator = who(by)

    async def do(operations: Operations) -> int:
        told = await operations.pause(operator, handler, lane_key, paused=paused)
        printing.show_pause(told, as_json=as_json)
        return FINE

    return with_operations(do)


def with_operations(do: Callable[[Operations], Awaitable[int]]) -> int:
    """Do something with what operators may do; returns its exit code, or 1 where it is refused."""
    settings = load_settings()
    configure_logging(settings)

    async def run() -> int:
        async with _operations(settings) as operations:
            return await do(operations)

    try:
        return asyncio.run(run())
    except Refused as error:
        printing.show_problem(str(error))
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        printing.show_problem(explain(error))
    return PROBLEMS


@asynccontextmanager
async def _operations(settings: Settings) -> AsyncIterator[Operations]:
    async def wake(_: Iterable[Lane]) -> None:
        """Leave it to the workers, which look every two seconds: no command needs Redis for that."""

    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace operator", size=1)
    try:
        yield Operations(engine, lambda: loader.load(settings.handlers), wake)
    finally:
        await engine.dispose()


def who(by: str | None) -> Operator:
    """Say who decides: whom `--by` names, or the user of the operating system."""
    name = (by or "").strip()
    if not name:
        with contextlib.suppress(OSError, KeyError, ImportError):
            name = getpass.getuser()
    return Operator(name or f"user {os.getuid()}", "command")


def _edit(decision: Decision) -> dict[str, Any] | None:
    """Read the edited record, from the command line or a file; None where there is none."""
    given = decision.record
    if decision.record_file is not None:
        if given is not None:
            raise ConfigurationError(["--record and --record-file exclude each other"])
        try:
            given = decision.record_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError([f"--record-file cannot be read ({type(error).__name__})"]) from None
    if given is None:
        return None
    try:
        record = _record(given)
    except msgspec.MsgspecError:
        problem = 'the record must be a JSON object of columns and values, as {"status": "paid"}'
        raise ConfigurationError([problem]) from None
    if not record:
        raise ConfigurationError(["the edited record names no column"])
    return record
