"""Whether a lane is whole: the one check that finds whatever Redis has lost. Pure.

Every entry names the entry before it in its lane, the first of a generation the floor. What Redis does to a
stream (loses all, the end, the middle, refuses one and takes the next) shows as an entry that names one
which the lane has not passed.
"""

from worker.change import Position


def is_hole(before: Position, previous: Position, floor: Position) -> bool:
    """Tell whether something is missing before an entry.

    Args:
        before: up to where the lane is applied, entries that are about to be applied included.
        previous: the entry before it, as it names it.
        floor: where its generation begins.
    """
    return previous != floor and previous > before
