"""What a person asks for, by command or over HTTP: who it is, and which dead letters are meant. Pure."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple

from worker.errors import Refused

_AGO: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_IDS: Final = range(-(2**63), 2**63)


class Operator(NamedTuple):
    """Who decides."""

    name: str
    """The user of the operating system or what `--by` says; over HTTP the subject of the token."""
    via: Literal["command", "http"]


class Which(NamedTuple):
    """Which dead letters are meant: all of what is named must hold."""

    ids: tuple[int, ...] | None = None
    handler: str | None = None
    table: str | None = None
    """`schema.table`."""
    error_class: str | None = None
    """As listed, or without its module."""
    since: datetime | None = None
    """Of the last failure."""
    until: datetime | None = None
    """Of the last failure; not included."""

    @property
    def is_all(self) -> bool:
        """True where nothing is named."""
        return self == Which()

    @property
    def possible_ids(self) -> list[int] | None:
        """The ids that a row can have; None where none is named."""
        return None if self.ids is None else [one for one in self.ids if one in _IDS]


def which(
    ids: Iterable[int] = (),
    *,
    handler: str | None = None,
    table: str | None = None,
    error_class: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> Which:
    """Read what a person has typed; a table without a schema is of public.

    Raises:
        Refused: a time that is none.
    """
    table = table if table is None or "." in table else f"public.{table}"
    times = (_moment("since", since), _moment("until", until))
    return Which(tuple(ids) or None, handler, table, error_class, *times)


def _moment(name: str, given: str | None) -> datetime | None:
    """Read a time: ISO 8601, in UTC where it names no zone, or so long ago, as in 90m."""
    if given is None:
        return None
    if ago := _AGO.fullmatch(given):
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(given)
    except ValueError:
        raise Refused(
            f"{name} {given} is no time: write 2026-01-31T09:00, or 90m, 12h, 7d for so long ago"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
