"""The command line: names, options and help of the commands. What they do is in `worker.cli.commands`.

Each command imports that module when it is called, so that `--help` need not load drivers and clients.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from worker.cli import completing
from worker.cli.manual import epilog

app = typer.Typer(
    name="tailrace",
    no_args_is_help=True,
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

    To begin: `migrate` makes the tables, `check` says what is still missing
    and mends it with --fix, then `listen` and `work` run for ever. `COMMAND
    --help` has examples.

    Settings come from the environment and from .env. Exit codes: 0 fine, 1
    found problems, 2 bad usage or configuration.
    """


@app.command(epilog=epilog("listen"))
def listen() -> None:
    """Run the listener: read changes and put them into the lanes.

    One works, any further one stands by and takes over within 8 seconds. It
    answers over HTTP on PORT, and ends in good order on SIGTERM. While
    Postgres, Redis or Realtime is away, it waits, and says so.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.listen())


@app.command(epilog=epilog("work"))
def work() -> None:
    """Run a worker: drain the lanes through the handlers.

    The same as `arq worker.jobs.WorkerSettings`. Any number of them share the
    lanes, on any machines. On SIGTERM what is in flight is finished within
    WORKER_DRAIN_SECONDS, or rolled back and taken up by others.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.work())


@app.command(epilog=epilog("run"))
def run() -> None:
    """Run migrations, and then a listener and a worker together, as one process tree.

    For one machine. Where one of the two ends, the other one is ended, too. Killed, this command takes
    both along: they end in good order, as on SIGTERM.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.run())


@app.command(epilog=epilog("migrate"))
def migrate(
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL instead of running it.")] = False,
) -> None:
    """Bring Tailrace's tables and those of the handlers up to date.

    Makes schema tailrace, puts the canary into the publication, and runs the
    Alembic environments in `migrations/` of the packages named in HANDLERS.
    What is up to date is left as it is.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.migrate(sql=sql))


@app.command(epilog=epilog("handlers"))
def handlers(*, as_json: Json = False) -> None:
    """List the handlers of HANDLERS with what they subscribe to and their options.

    Imports the modules, and asks no server. Where a handler names no option,
    the setting's value is shown.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.handlers(as_json=as_json))


@app.command(epilog=epilog("check"))
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
    """Examine all that a start needs; say what is wrong, and what mends it.

    Settings, keys, handlers against the live schema, delivery and replication
    slots, grants, row-level security, Redis, Realtime, clocks. It changes
    nothing without --fix; with it, only what is safe: the catalogue, never a
    row, and a slot only where you name it.
    """
    from worker.cli import checking  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(checking.check(checking.Asked(fix, yes, drop_slot or ()), as_json=as_json))


@app.command(epilog=epilog("status"))
def status(
    *,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Count again from slot, Redis and Postgres; 1 if anything is missing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what the listener and the workers are doing.

    Asks the listener on PORT of this machine; from the database if it cannot
    be asked. For each handler: read = filtered + applied + held + parked +
    dead + queued.
    """
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.status(verify=verify, as_json=as_json))


@app.command(epilog=epilog("models"))
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
    """Write SQLAlchemy models of the database's tables and views.

    The same database gives the same text. Needs the extra `models`
    (sqlacodegen) where it is run; what it writes needs SQLAlchemy alone.
    """
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
OfHandler = Annotated[
    str | None, typer.Option("--handler", help="Of this handler.", autocompletion=completing.handlers)
]
OfTable = Annotated[
    str | None,
    typer.Option("--table", help="Of this table, as schema.table.", autocompletion=completing.tables),
]
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
HandlerName = Annotated[
    str,
    typer.Argument(metavar="HANDLER", help="Name of the handler.", autocompletion=completing.handlers),
]
LaneKey = Annotated[
    str | None,
    typer.Option("--lane-key", help="Only this lane key: a value, or a JSON array of the key's values."),
]


@app.command(epilog=epilog("backfill"))
def backfill(  # noqa: PLR0913 - the options of a command
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE", help="Whose rows, as orders or shop.orders.", autocompletion=completing.tables
        ),
    ] = None,
    *,
    handler: Annotated[
        str | None,
        typer.Option(
            "--handler",
            help="For this handler; by default all derive handlers of the table.",
            autocompletion=completing.handlers,
        ),
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
    """Give the rows that are there to handlers, beside live changes; without TABLE, list backfills.

    Derive handlers are given the keys of the rows; a change handler, which
    must be named, the rows as INSERTs, in proven delivery.

    The listener carries it out, page by page; after a restart it goes on
    where it was. Live changes go first.
    """
    from worker.cli import backfills  # noqa: PLC0415 - see the module's docstring

    asked = backfills.Asked(table, handler, where, rate, resume, cancel, wait, by)
    raise typer.Exit(backfills.backfill(asked, as_json=as_json))


@dead_letters.command("list", epilog=epilog("dead-letters list"))
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
    """List dead letters, the oldest first.

    All conditions that are given must hold. Nothing waits for a dead letter,
    unless its handler says so.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted((), handler, table, error_class, since, until)
    raise typer.Exit(operator.list_dead_letters(wanted, limit, as_json=as_json))


@dead_letters.command("show", epilog=epilog("dead-letters show"))
def show_dead_letter(
    id_: Annotated[int, typer.Argument(metavar="ID", help="Its id.")], *, as_json: Json = False
) -> None:
    """Show all of one: its rows, its error with traceback and hint, and what was decided about it."""
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.show_dead_letter(id_, as_json=as_json))


@dead_letters.command("redrive", epilog=epilog("dead-letters redrive"))
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
    """Have dead letters tried again, in the order of their ids, from the first attempt on.

    Newer changes of the same key may have been applied meanwhile: the answer
    says how many. Who decided is kept in the audit trail.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted(ids or (), handler, table, error_class, since, until)
    decision = operator.Decision("redrive", everything, dry_run, by, record, record_file)
    raise typer.Exit(operator.decide(wanted, decision, as_json=as_json))


@dead_letters.command("discard", epilog=epilog("dead-letters discard"))
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
    """Forget dead letters: their changes count as filtered out from now on.

    There is no way back; the audit trail keeps which they were, without their
    rows.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    wanted = operator.Wanted(ids or (), handler, table, error_class, since, until)
    decision = operator.Decision("discard", everything, dry_run, by)
    raise typer.Exit(operator.decide(wanted, decision, as_json=as_json))


@lanes.command("list", epilog=epilog("lanes list"))
def list_lanes(
    handler: Annotated[
        str | None,
        typer.Argument(metavar="HANDLER", help="Only of this handler.", autocompletion=completing.handlers),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the handlers with what is paused, and what waits.

    `held` waits for a retry, or behind one; `parked` waits in Postgres
    because its lane lags or is paused.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.list_lanes(handler, as_json=as_json))


@lanes.command("pause", epilog=epilog("lanes pause"))
def pause(handler: HandlerName, *, lane_key: LaneKey = None, by: By = None, as_json: Json = False) -> None:
    """Pause a handler, or one lane key of it: its changes wait in Postgres, in their order.

    Nothing is lost, and no other handler waits. It holds over restarts, until
    `resume`.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.pause(handler, lane_key, by, paused=True, as_json=as_json))


@lanes.command("resume", epilog=epilog("lanes resume"))
def resume(handler: HandlerName, *, lane_key: LaneKey = None, by: By = None, as_json: Json = False) -> None:
    """Let a handler, or one lane key of it, go on.

    What has waited is applied first, in its order.
    """
    from worker.cli import operator  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(operator.pause(handler, lane_key, by, paused=False, as_json=as_json))
