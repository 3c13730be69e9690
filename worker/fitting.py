"""The handlers that the settings name, held against the database: every process begins with it."""

from dataclasses import replace
from typing import Literal

from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import loader
from worker.catalogue import Catalogue, read_catalogue
from worker.errors import ConfigurationError
from worker.registry import Handler
from worker.wal.publication import recorded_keys


async def load_handlers(
    settings: Settings, engine: AsyncEngine, delivery: Literal["plain", "proven"]
) -> tuple[tuple[Handler, ...], Catalogue]:
    """Load the handlers and hold them against the database.

    Raises:
        ConfigurationError: with everything that does not fit.
    """
    handlers = loader.load(settings.handlers)
    tables = {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
    async with engine.connect() as connection:
        catalogue = await read_catalogue(connection, settings.publication, tables)
        keys = await recorded_keys(connection)
    catalogue.tables = {
        name: replace(table, earlier_keys=keys.get(name, ())) for name, table in catalogue.tables.items()
    }
    problems = loader.validate(handlers, catalogue, delivery, publication=settings.publication)
    if problems:
        raise ConfigurationError(problems)
    return handlers, catalogue
