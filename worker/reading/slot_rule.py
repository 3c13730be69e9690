"""Up to where the slot may move: the one rule that decides whether anything can be lost. Pure.

A lane is passed when nothing was enqueued for it in this generation, or when its position in Postgres has
reached the last entry that was. What Redis holds is no evidence, and neither is the position of a lane for
which nothing was enqueued: an idle lane must not pin the slot, nor an old row of one.
"""

from collections.abc import Mapping

from worker.change import Position
from worker.lanes import Lane


def slot_target(last: Mapping[Lane, Position], positions: Mapping[Lane, Position], read_to: int) -> int:
    """Give the LSN below which every commit is accounted for in every lane.

    Args:
        last: id of the last entry enqueued in each lane, in this generation.
        positions: of the lanes, as Postgres has them.
        read_to: all commits below this LSN are wholly enqueued.
    """
    target = read_to
    for lane, top in last.items():
        # A lane without a row belongs to a handler that is gone: it pins nothing.
        position = positions.get(lane)
        if position is not None and position < top:
            target = min(target, position.lsn)
    return target
