"""At level debug: one line for each change at each place, so that it can be followed by its position.

Off, it costs a question for each batch. Lines carry names and positions, never a value of a row.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import structlog

from worker.raw import Position, RawChange

log = structlog.get_logger(__name__)
_logger = logging.getLogger(__name__)

Fates = list[tuple[Position, str]]
"""What became of changes in a pass: applied, held, dead or parked."""


def follows() -> bool:
    """Tell whether anybody wants to know."""
    return _logger.isEnabledFor(logging.DEBUG)


def read(position: Position, raw: RawChange, lanes: Mapping[str, Sequence[int]]) -> None:
    """Say that the listener has a change, and in which lanes it goes to whom."""
    log.debug(
        "change read",
        position=str(position),
        table=f"{raw.schema}.{raw.table}",
        type=raw.type,
        lanes={handler: sorted(set(numbers)) for handler, numbers in lanes.items()},
    )


def filtered(raw: RawChange, handlers: Iterable[str]) -> None:
    """Say that handlers do not want it; in plain delivery it has no position."""
    position = None if raw.position is None else str(raw.position)
    log.debug(
        "change filtered out",
        position=position,
        table=f"{raw.schema}.{raw.table}",
        type=raw.type,
        handlers=list(handlers),
    )


def written(positions: Iterable[Position], generation: str) -> None:
    """Say that its entries stand in Redis."""
    for position in dict.fromkeys(positions):
        log.debug("change written", position=str(position), generation=generation)


def passed(handler: str, lane: int, fates: Fates) -> None:
    """Say what became of it; after the commit."""
    for position, fate in fates if follows() else ():
        log.debug("change passed", position=str(position), handler=handler, lane=lane, fate=fate)
