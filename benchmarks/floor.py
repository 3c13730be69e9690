"""The floor: the least that can be done for a backlog, written by hand, in a process of its own.

One Redis stream, one SQL statement for 500 changes in one transaction, then XDEL. No lanes, no positions, no
retries, no types: what it lacks is what the daemon's figures are to be compared with.
"""

import argparse
from decimal import Decimal
from typing import Any, Final, cast

import asyncpg
import orjson
import uvloop
from redis.asyncio import Redis

from benchmarks.workloads import BATCH, DERIVE

STREAM: Final = "floor"
_AT_ONCE: Final = 500
_DERIVE: Final = DERIVE.format(ids="$1")
_BATCH: Final = BATCH.format(ids="$1", customers="$2", statuses="$3", amounts="$4")


async def drain(database_url: str, redis_url: str, kind: str) -> None:
    """Empty the stream: `derive` reads the orders of ids, `batch` decodes payloads."""
    db = await cast("Any", asyncpg).connect(database_url)
    redis: Any = Redis.from_url(redis_url)
    try:
        while entries := await redis.xrange(STREAM, "-", "+", _AT_ONCE):
            payloads = [fields[b"e"] for _, fields in entries]
            if kind == "derive":
                await db.execute(_DERIVE, [int(payload) for payload in payloads])
            else:
                await db.execute(_BATCH, *_columns(payloads))
            await redis.xdel(STREAM, *(id_ for id_, _ in entries))
    finally:
        await redis.aclose()
        await db.close()


def _columns(payloads: list[bytes]) -> tuple[list[Any], ...]:
    records = [orjson.loads(payload)["record"] for payload in payloads]
    return (
        [record["id"] for record in records],
        [record["customer_id"] for record in records],
        [record["status"] for record in records],
        [Decimal(str(record["amount"])) for record in records],
    )


def main() -> None:
    made = argparse.ArgumentParser()
    for name in ("database-url", "redis-url"):
        made.add_argument(f"--{name}", required=True)
    made.add_argument("--kind", choices=("derive", "batch"), required=True)
    options = made.parse_args()
    uvloop.run(drain(options.database_url, options.redis_url, options.kind))


if __name__ == "__main__":
    main()
