"""Since when each table has surely been read, and in which intervals changes may have been lost. Pure.

All moments are of this machine's clock. It decides nothing: what counts as lost is told to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from worker.realtime.subscription import TableName
from worker.source import Gap


@dataclass
class _Table:
    first: datetime | None = None
    live: datetime | None = None
    """Since when it is subscribed without a break."""
    lost: tuple[datetime, str] | None = None
    """Last sure moment and cause, from the loss until it is subscribed again."""


class Continuity:
    """Turns "subscribed", "lost" and "proven" into gaps.

    Args:
        tables: the tables to keep account of; others are ignored.
    """

    def __init__(self, tables: Sequence[TableName]) -> None:
        self._tables = {table: _Table() for table in tables}
        self._proven: datetime | None = None

    @property
    def subscribed_since(self) -> datetime | None:
        """The moment from which every table has been subscribed without a break; None while one is not."""
        moments = [state.live for state in self._tables.values()]
        known = [moment for moment in moments if moment is not None]
        return max(known) if known and len(known) == len(moments) else None

    @property
    def first_subscribed(self) -> dict[TableName, datetime]:
        """When each table was subscribed for the first time; tables that never were are absent."""
        return {name: state.first for name, state in self._tables.items() if state.first is not None}

    @property
    def sure_until(self) -> datetime | None:
        """The moment up to which no table can have lost anything unseen; None before all were subscribed."""
        moments: list[datetime] = []
        for state in self._tables.values():
            if state.live is not None:
                moments.append(self._sure(state.live))
            elif state.lost is not None:
                moments.append(state.lost[0])
            else:
                return None
        return min(moments, default=None)

    def prove(self, moment: datetime) -> None:
        """What was committed before this moment has arrived, for every live table."""
        if self._proven is None or moment > self._proven:
            self._proven = moment

    def subscribed(self, tables: Iterable[TableName], now: datetime) -> list[Gap]:
        """Tables are subscribed; return the gaps that end with it (none for a first subscription)."""
        ended: dict[tuple[datetime, str], list[TableName]] = {}
        for name, state in self._known(tables):
            if state.lost is not None:
                ended.setdefault(state.lost, []).append(name)
            state.first = state.first or now
            state.live, state.lost = now, None
        return [Gap(since, now, cause, tuple(names)) for (since, cause), names in ended.items()]

    def lost(self, tables: Iterable[TableName], cause: str) -> None:
        """Tables are not subscribed any more. What is lost already keeps its first cause."""
        for _, state in self._known(tables):
            if state.live is not None:
                state.lost = self._sure(state.live), cause
                state.live = None

    def doubtful(self, tables: Iterable[TableName], now: datetime, cause: str) -> list[Gap]:
        """Tables are live, but up to now something may have been lost; return the gaps."""
        doubtful: dict[datetime, list[TableName]] = {}
        for name, state in self._known(tables):
            if state.live is not None:
                doubtful.setdefault(self._sure(state.live), []).append(name)
        return [Gap(since, now, cause, tuple(names)) for since, names in doubtful.items()]

    def _sure(self, live: datetime) -> datetime:
        return live if self._proven is None else max(live, self._proven)

    def _known(self, tables: Iterable[TableName]) -> list[tuple[TableName, _Table]]:
        return [(name, self._tables[name]) for name in tables if name in self._tables]
