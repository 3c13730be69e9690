"""Examines the Alembic environments of the handlers: whether their migrations have been run."""

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.check.findings import Finding, Fix

FIX = Fix("migrate", "python -m worker migrate")


async def examine_environment(connection: AsyncConnection, folder: Path) -> Finding:
    """Return what is to be said of one environment.

    Args:
        connection: nothing is written by it.
        folder: with `env.py` and `versions/`.
    """
    name = "/".join(folder.parts[-2:])
    try:
        applied, wanted = await connection.run_sync(_revisions, folder)
    except Exception as error:  # noqa: BLE001 - env.py is a user's, and may do anything
        await connection.rollback()
        detail = f"{name} cannot be run ({type(error).__name__})"
        remedy = "see `python -m worker migrate`; its env.py must take the connection that it is given"
        return Finding("migrations", "warning", detail, remedy)
    await connection.rollback()
    here, needed = ", ".join(sorted(applied)) or "none", ", ".join(sorted(wanted))
    if applied == wanted:
        return Finding("migrations", "ok", f"{name}: current ({here})")
    detail = f"{name}: the database is at {here}, the handlers need {needed}"
    return Finding("migrations", "problem", detail, f"run: {FIX.words}", (FIX,))


def _revisions(connection: Connection, folder: Path) -> tuple[set[str], set[str]]:
    """Give the revisions that the database is at, and those that there are, as the environment sees them."""
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    applied: set[str] = set()

    def look(revisions: Any, _context: MigrationContext) -> list[RevisionStep]:  # noqa: ANN401 - one, or several
        applied.update([revisions] if isinstance(revisions, str) else revisions)
        return []

    with EnvironmentContext(config, script, fn=look, dont_mutate=True):
        script.run_env()
    return applied, set(script.get_heads())
