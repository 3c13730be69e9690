"""The floor: the least that can be done, written by hand, in processes of its own.

`drain`: one Redis stream, one SQL statement for 500 changes in one transaction, then XDEL. `read`: a slot of
Postgres into that stream. No lanes, no positions, no retries, no types, and what is lost is lost: what it
lacks is what the daemon's figures are to be compared with.
"""

import argparse
import asyncio
import struct
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final, cast

import asyncpg
import orjson
import uvloop
from redis.asyncio import Redis

from benchmarks.workloads import BATCH, DERIVE

STREAM: Final = "floor"
_SLOT: Final = "floor"
_AT_ONCE: Final = 500
_READ_AT_ONCE: Final = 2_000
_NOTHING_SECONDS: Final = 0.001
_DERIVE: Final = DERIVE.format(ids="$1")
_BATCH: Final = BATCH.format(ids="$1", customers="$2", statuses="$3", amounts="$4")
_MAKE_SLOT: Final = (
    "select pg_create_logical_replication_slot($1, 'pgoutput')"
    " where not exists (select from pg_replication_slots where slot_name = $1)"
)
_READ: Final = (
    "select data from pg_logical_slot_get_binary_changes($1, null, $2,"
    " 'proto_version', '1', 'publication_names', 'supabase_realtime')"
)
_LENGTH: Final = struct.Struct(">I")


async def drain(database_url: str, redis_url: str, kind: str, *, follow: bool) -> None:
    """Empty the stream: `derive` reads the orders of ids, `batch` decodes payloads."""
    db = await cast("Any", asyncpg).connect(database_url)
    redis: Any = Redis.from_url(redis_url)
    try:
        while True:
            while entries := await redis.xrange(STREAM, "-", "+", _AT_ONCE):
                payloads = [fields[b"e"] for _, fields in entries]
                if kind == "derive":
                    await db.execute(_DERIVE, [int(payload) for payload in payloads])
                else:
                    await db.execute(_BATCH, *_columns(payloads))
                await redis.xdel(STREAM, *(id_ for id_, _ in entries))
            if not follow:
                return
            await redis.xread({STREAM: "$"}, count=1, block=10)  # an entry written meanwhile waits so long
    finally:
        await redis.aclose()
        await db.close()


async def read(database_url: str, redis_url: str) -> None:
    """Write each insert that the slot has into the stream, for ever."""
    db = await cast("Any", asyncpg).connect(database_url)
    redis: Any = Redis.from_url(redis_url)
    try:
        await db.execute(_MAKE_SLOT, _SLOT)
        print('{"message": "reading"}', flush=True)
        while True:
            records = list(_inserted(await db.fetch(_READ, _SLOT, _READ_AT_ONCE)))
            for start in range(0, len(records), _AT_ONCE):
                pipe = redis.pipeline(transaction=False)
                for record in records[start : start + _AT_ONCE]:
                    pipe.xadd(STREAM, {"e": orjson.dumps({"record": record})})
                await pipe.execute()
            if not records:
                await asyncio.sleep(_NOTHING_SECONDS)
    finally:
        await redis.aclose()
        await db.close()


def _inserted(rows: list[Any]) -> Iterator[dict[str, Any]]:
    """Decode the inserts among messages of pgoutput."""
    for (data,) in rows:
        if data[0] != ord("I"):
            continue
        at, values = 8, list[str | None]()  # I, relation, N, number of columns
        while at < len(data):
            kind = data[at]
            at += 1
            if kind == ord("t"):
                (length,) = _LENGTH.unpack_from(data, at)
                values.append(data[at + 4 : at + 4 + length].decode())
                at += 4 + length
            else:
                values.append(None)
        id_, customer, status, amount = values[:4]
        yield {"id": int(id_ or 0), "customer_id": int(customer or 0), "status": status, "amount": amount}


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
    made.add_argument("work", choices=("drain", "read"))
    for name in ("database-url", "redis-url"):
        made.add_argument(f"--{name}", required=True)
    made.add_argument("--kind", choices=("derive", "batch"), default="batch")
    made.add_argument("--follow", action="store_true", help="do not end when the stream is empty")
    options = made.parse_args()
    if options.work == "read":
        uvloop.run(read(options.database_url, options.redis_url))
    else:
        uvloop.run(drain(options.database_url, options.redis_url, options.kind, follow=options.follow))


if __name__ == "__main__":
    main()
