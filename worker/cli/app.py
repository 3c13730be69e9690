"""The command line: names, options and help of the commands. What they do is in `worker.cli.commands`.

Each command imports that module when it is called, so that `--help` need not load drivers and clients.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tailrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they show local variables, and those are settings and rows
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"tailrace {version('tailrace')}")
        raise typer.Exit


@app.callback()
def _tailrace(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn committed changes of a Supabase project into derived data: nothing lost, nothing applied twice.

    Settings come from the environment and from .env. Exit codes: 0 fine, 1 found problems, 2 bad usage or
    configuration.
    """


@app.command()
def listen() -> None:
    """Run the listener: read changes and put them into the lanes."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.listen())


@app.command()
def work() -> None:
    """Run a worker: drain the lanes through the handlers; the same as `arq worker.jobs.WorkerSettings`."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.work())


@app.command()
def run() -> None:
    """Run a listener and a worker together, as one process tree."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.run())


@app.command()
def migrate(
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL instead of running it.")] = False,
) -> None:
    """Bring Tailrace's tables and those of the handlers up to date."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.migrate(sql=sql))


@app.command()
def handlers(*, as_json: Json = False) -> None:
    """List the handlers of HANDLERS with what they subscribe to and their options."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.handlers(as_json=as_json))


@app.command()
def check(
    *,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended safely; says what it ran.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --fix: do not ask.")] = False,
    drop_slot: Annotated[
        list[str] | None,
        typer.Option("--drop-slot", metavar="SLOT", help="With --fix: drop this slot, which nobody reads."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Examine all that a start needs; say what is wrong, and what mends it."""
    from worker.cli import checking  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(checking.check(checking.Asked(fix, yes, drop_slot or ()), as_json=as_json))


@app.command()
def status(
    *,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Count again from slot, Redis and Postgres; 1 if anything is missing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what the listener and the workers are doing; from the database if the listener cannot be asked."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.status(verify=verify, as_json=as_json))


@app.command()
def models(
    *,
    schema: Annotated[
        str, typer.Option(help="Schemas, with commas between them; public where nothing is said.")
    ] = "",
    tables: Annotated[str, typer.Option(help="Only these tables and views, such as orders,shop.stock.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
    compare: Annotated[
        bool, typer.Option("--check", help="Write nothing; 1 where the file of --out is no longer true.")
    ] = False,
) -> None:
    """Write SQLAlchemy models of the database's tables and views."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    listed = [tuple(part.strip() for part in one.split(",") if part.strip()) for one in (schema, tables)]
    raise typer.Exit(commands.models(schemas=listed[0], tables=listed[1], out=out, check=compare))


# For operators

_HELP = {"help_option_names": ["-h", "--help"]}
dead_letters = typer.Typer(no_args_is_help=True, context_settings=_HELP)
lanes = typer.Typer(no_args_is_help=True, context_settings=_HELP)
app.add_typer(
    dead_letters, name="dead-letters", help="Look at changes that were given up, and decide about them."
)
app.add_typer(lanes, name="lanes", help="See what is paused and what waits; pause handlers, or lane keys.")

Ids = Annotated[list[int] | None, typer.Argument(metavar="ID", help="Their ids.")]
OfHandler = Annotated[str | None, typer.Option("--handler", help="Of this handler.")]
OfTable = Annotated[str | None, typer.Option("--table", help="Of this table, as schema.table.")]
OfErrorClass = Annotated[
    str | None, typer.Option("--error-class", help="Of this class of error, with or without its module.")
]
Since = Annotated[
    str | None,
    typer.Option("--since", help="Failed last at this time or later: ISO 8601 (UTC), or 90m, 12h, 7d ago."),
]
Until = Annotated[str | None, typer.Option("--until", help="Failed last before this time.")]
Everything = Annotated[bool, typer.Option("--all", help="All of them, where nothing else is named.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which they are, and do nothing.")]
By = Annotated[
    str | None,
    typer.Option("--by", help="Who decides, for the audit trail, if not the user of the system."),
]
HandlerName = Annotated[str, typer.Argument(metavar="HANDLER", help="Name of the handler.")]
LaneKey = Annotated[
    str | None,
    typer.Option("--lane-key", help="Only this lane key: a value, or a JSON array of the key's values."),
]


@app.command()
def backfill(  # noqa: PLR0913 - the options of a command
    table: Annotated[
        str | None, typer.Argument(metavar="TABLE", help="Whose rows, as orders or shop.orders.")
    ] = None,
    *,
    handler: Annotated[
        str | None, typer.Option("--handler", help="For this derive handler; all of the table by default.")
    ] = None,
    where: Annotated[str | None, typer.Option("--where", help="Only rows for which this SQL holds.")] = None,
    rate: Annotated[int | None, typer.Option("--rate", min=1, help="Rows a second, at most.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Follow one, or have a cancelled one go on; --rate changes its."),
    ] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Have it stop.")] = False,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Stay until it is done; by default on a terminal."),
    ] = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Give the rows that are there to derive handlers, beside live changes; without TABLE, list backfills.

    The listener carries it out, page by page; after a restart it goes on where it was. Live changes go first.
    """
    from worker.cli import backfills  # noqa: PLC0415 - see the module's docstring

    asked = backfills.Asked(table, handler, where, rate, resume, cancel, wait, by)
    raise typer.Exit(backfills.backfill(asked, as_json=as_json))


@dead_letters.command("list")
def list_dead_letters(
    *,
    handler: OfHandler = None,
    table: OfTable = None,
    error_class: OfErrorClass = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List dead letters, the oldest first."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted((), handler, table, error_class, since, until)
    raise typer.Exit(operator.list_dead_letters(wanted, limit, as_json=as_json))


@dead_letters.command("show")
def show_dead_letter(
    id_: Annotated[int, typer.Argument(metavar="ID", help="Its id.")], *, as_json: Json = False
) -> None:
    """Show all of one: its rows, its error with traceback and hint, and what was decided about it."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.show_dead_letter(id_, as_json=as_json))


@dead_letters.command("redrive")
def redrive(  # noqa: PLR0913 - the options of a command
    ids: Ids = None,
    *,
    handler: OfHandler = None,
    table: OfTable = None,
    error_class: OfErrorClass = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    record: Annotated[
        str | None,
        typer.Option("--record", help='Other values for columns of its record, as {"status": "paid"}.'),
    ] = None,
    record_file: Annotated[Path | None, typer.Option("--record-file", help="The same, from a file.")] = None,
    dry_run: DryRun = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Have dead letters tried again, in the order of their ids, from the first attempt on."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted(ids or (), handler, table, error_class, since, until)
    decision = operator.Decision("redrive", everything, dry_run, by, record, record_file)
    raise typer.Exit(operator.decide(wanted, decision, as_json=as_json))


@dead_letters.command("discard")
def discard(  # noqa: PLR0913 - the options of a command
    ids: Ids = None,
    *,
    handler: OfHandler = None,
    table: OfTable = None,
    error_class: OfErrorClass = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    dry_run: DryRun = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Forget dead letters: their changes count as filtered out from now on."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted(ids or (), handler, table, error_class, since, until)
    decision = operator.Decision("discard", everything, dry_run, by)
    raise typer.Exit(operator.decide(wanted, decision, as_json=as_json))


@lanes.command("list")
def list_lanes(
    handler: Annotated[str | None, typer.Argument(metavar="HANDLER", help="Only of this handler.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the handlers with what is paused, and what waits."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.list_lanes(handler, as_json=as_json))


@lanes.command("pause")
def pause(handler: HandlerName, *, lane_key: LaneKey = None, by: By = None, as_json: Json = False) -> None:
    """Pause a handler, or one lane key of it: its changes wait in Postgres, in their order."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.pause(handler, lane_key, by, paused=True, as_json=as_json))


@lanes.command("resume")
def resume(handler: HandlerName, *, lane_key: LaneKey = None, by: By = None, as_json: Json = False) -> None:
    """Let a handler, or one lane key of it, go on."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.pause(handler, lane_key, by, paused=False, as_json=as_json))
