"""Which lanes are to be parked, and up to which entry: lag is private. Pure.

A lane above its own limit is parked down to half of it. Below that, what is under way is bounded for all
handlers together, and one handler with many lanes could use that up alone: where reading has stopped for it,
and others have nothing left to do, the handlers above their share are parked down to half of it. A handler
that is alone is never parked for that: the source holds the rest.
"""

from collections.abc import Mapping
from typing import NamedTuple

from worker.lanes import NOTHING, Backlog, Lane, Top, by_handler


class Bounds(NamedTuple):
    """What may be under way in Redis."""

    entries: int
    """Of all lanes together."""
    size: int
    """Of all lanes together, in bytes."""
    lane_entries: int
    """Of one lane."""
    handlers: int
    """How many share it."""

    @property
    def lane_size(self) -> int:
        """Bytes of one lane: the same part of all bytes."""
        return self.size * self.lane_entries // max(1, self.entries)

    def has_room(self, backlog: Backlog) -> bool:
        """Tell whether reading may go on."""
        return backlog.entries < self.entries and backlog.size < self.size


def to_park(backlogs: Mapping[Lane, Backlog], tops: Mapping[Lane, Top], bounds: Bounds) -> dict[Lane, int]:
    """Choose lanes to be parked.

    Args:
        backlogs: of each lane, what is not applied yet.
        tops: the last entry of each lane.
        bounds: what may be under way.

    Returns:
        For each lane to be parked, the count of the entry up to which.
    """
    lane_entries = min(bounds.lane_entries, max(1, bounds.entries // 2))
    lane_size = min(bounds.lane_size, max(1, bounds.size // 2))
    keep: dict[Lane, int] = {}
    for lane, backlog in backlogs.items():
        if backlog.entries > lane_entries or backlog.size > lane_size:
            keep[lane] = min(lane_entries // 2, _fitting(backlog, lane_size // 2))
    for lane, rest in _above_share(backlogs, bounds).items():
        keep[lane] = min(rest, keep.get(lane, rest))
    return {lane: tops[lane].entries - rest for lane, rest in keep.items()}


def _above_share(backlogs: Mapping[Lane, Backlog], bounds: Bounds) -> dict[Lane, int]:
    """Where all is full and somebody has nothing to do: what each lane of the others may keep."""
    if bounds.has_room(sum(backlogs.values(), NOTHING)):
        return {}
    sums = by_handler(backlogs)
    entries, size = bounds.entries // bounds.handlers, bounds.size // bounds.handlers
    above = {name for name, sum_ in sums.items() if sum_.entries > entries or sum_.size > size}
    idle = bounds.handlers - sum(
        sum_.entries > entries // 2 or sum_.size > size // 2 for sum_ in sums.values()
    )
    if not above or not idle:
        return {}
    mine = {lane: backlog for lane, backlog in backlogs.items() if lane.handler in above and backlog.entries}
    lanes = {name: sum(lane.handler == name for lane in mine) for name in above}
    return {
        lane: rest
        for lane, backlog in mine.items()
        if (rest := min(entries, _fitting(backlog, size)) // (2 * lanes[lane.handler])) < backlog.entries
    }


def _fitting(backlog: Backlog, size: int) -> int:
    """Tell how many entries of mean size are so many bytes."""
    return backlog.entries * size // max(1, backlog.size)
