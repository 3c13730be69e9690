"""The command line: names, options and help of the commands. What they do is in `worker.cli.commands`.

Each command imports that module when it is called, so that `--help` need not load drivers and clients.
"""

from importlib.metadata import version
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
def check(*, as_json: Json = False) -> None:
    """Examine settings, handlers, database, Redis and Realtime; say what is wrong and what mends it."""
    from worker.cli import commands  # noqa: PLC0415 - see the module's docstring

    raise typer.Exit(commands.check(as_json=as_json))


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
