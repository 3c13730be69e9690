"""Who decided what, and when: a row for each decision of a person, in the transaction that carries it out.

Row values of edits are kept here, in the database that has them anyway, and nowhere else. Decides nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.asked import Operator

Action = Literal["redrive", "discard", "pause", "resume"]

_NOTE = text(
    "insert into tailrace.audit (who, via, action, handler, dead_letter, lane_key, details)"
    " values (:who, :via, :action, :handler, :dead_letter, :lane_key, cast(:details as jsonb))"
)
_OF = text(
    "select at, who, via, action, details from tailrace.audit where dead_letter = :dead_letter order by id"
)
_encode = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode


class About(NamedTuple):
    """What is decided about."""

    handler: str
    dead_letter: int | None = None
    lane_key: bytes | None = None
    details: Mapping[str, Any] | None = None


async def note(
    connection: AsyncConnection,
    operator: Operator,
    action: Action,
    abouts: Sequence[About],
) -> None:
    """Note a decision about each of these, in the caller's transaction."""
    await connection.execute(
        _NOTE,
        [
            {
                "who": operator.name,
                "via": operator.via,
                "action": action,
                "handler": about.handler,
                "dead_letter": about.dead_letter,
                "lane_key": None if about.lane_key is None else about.lane_key.decode(),
                "details": None if about.details is None else _encode(about.details).decode(),
            }
            for about in abouts
        ],
    )


async def trail(connection: AsyncConnection, dead_letter: int) -> list[dict[str, Any]]:
    """List what was decided about a dead letter, from the first on."""
    return [dict(row) for row in (await connection.execute(_OF, {"dead_letter": dead_letter})).mappings()]
