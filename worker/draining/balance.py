"""Which lanes a worker hands to which other one, so that all of them have about as much to do.

Pure. A load is the time that passes took, in seconds for each second: a lane that never empties has about 1,
and a worker up to as many as it drains at once. A worker that joins has none, and is given lanes by
those that have more than their share; where all have next to nothing to do, lanes stay where they are.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.lanes import Lane

LEAST = 0.3
"""Above its share by less than this, a worker keeps what it has: to hand a lane over costs a moment, too."""
NOTHING = 0.01
"""A lane with less is not worth the trouble."""


def to_hand_over(me: str, loads: Mapping[str, float], lanes: "Mapping[Lane, float]") -> "dict[Lane, str]":
    """Choose what to hand over, and to whom.

    Args:
        me: this worker.
        loads: of all living workers, this one included.
        lanes: load of each lane that this worker drains.
    """
    if len(loads) < 2:  # noqa: PLR2004 - nobody to hand anything to
        return {}
    share = sum(loads.values()) / len(loads)
    # Half of what is too much: others may give to the same worker at this moment.
    left = (loads[me] - share) / 2
    if left < LEAST / 2 or loads[me] < share * 1.2:
        return {}
    given: dict[Lane, str] = {}
    after = {name: load for name, load in loads.items() if name != me}
    for lane, load in sorted(lanes.items(), key=lambda one: (-one[1], one[0])):
        idlest = min(after, key=lambda name: (after[name], name))
        # A lane cannot be divided: one that would only move the burden stays.
        if NOTHING <= load <= left * 2 and after[idlest] + load <= max(share, loads[me] - load) and left > 0:
            given[lane] = idlest
            after[idlest] += load
            left -= load
    return given


class Measured:
    """Load of each lane of a worker: what passes took lately counts more than what they took before."""

    def __init__(self) -> None:
        self._spent: dict[Lane, float] = {}
        self._loads: dict[Lane, float] = {}

    def spent(self, lane: "Lane", seconds: float) -> None:
        """Note the time of a pass."""
        self._spent[lane] = self._spent.get(lane, 0.0) + seconds

    def forget(self, lane: "Lane") -> None:
        """Note that the lane is another worker's now."""
        self._spent.pop(lane, None)
        self._loads.pop(lane, None)

    def after(self, seconds: float) -> "Mapping[Lane, float]":
        """Tell the load of each lane, so many seconds after the last call."""
        for lane in {*self._spent, *self._loads}:
            now = self._spent.get(lane, 0.0) / max(seconds, 0.001)
            load = (self._loads.get(lane, now) + now) / 2
            self._loads[lane] = load
            if load < NOTHING / 10:
                del self._loads[lane]
        self._spent.clear()
        return self._loads


__all__ = ["LEAST", "Measured", "to_hand_over"]
