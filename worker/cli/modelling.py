"""`python -m worker models`: from the database to a file, and back to a yes or no.

It brings settings, database and file together; what is written is decided in `worker.models`.
"""

import asyncio
import importlib.util
from pathlib import Path

from sqlalchemy import Connection

from config.settings import Settings
from worker.database import DATABASE_ERRORS, explain, make_engine
from worker.errors import ConfigurationError
from worker.models import Wanted, differences, reflect


def models_text(settings: Settings, wanted: Wanted, command: str) -> str:
    """Give the models of the project's database as the text of a module.

    Raises:
        ConfigurationError: what writes them is not installed; the database is away, or lacks what is wanted.
    """
    if importlib.util.find_spec("sqlacodegen") is None:
        needed = (
            "models are written by sqlacodegen: pip install '../tailrace[models]', which is your checkout"
        )
        raise ConfigurationError([needed])
    try:
        return asyncio.run(_text(settings, wanted, command))
    except DATABASE_ERRORS as error:
        raise ConfigurationError([f"{explain(error)}: no model was written"]) from error


async def _text(settings: Settings, wanted: Wanted, command: str) -> str:
    from worker.models.writing import write  # noqa: PLC0415 - needs an extra of the package

    def made(connection: Connection) -> str:
        return write(connection, reflect(connection, wanted), command)

    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace models", size=1)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(made)
    finally:
        await engine.dispose()


def drift(text: str, file: Path) -> list[str]:
    """Tell what the database says and the file does not.

    Raises:
        ConfigurationError: there is no such file, or it is no Python.
    """
    try:
        return differences(file.read_text(encoding="utf-8"), text)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ConfigurationError([f"{file} cannot be read as models ({type(error).__name__})"]) from None
