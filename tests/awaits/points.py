"""Which points are struck: every place at its first and at its last visit. Pure."""

import random
from collections.abc import Mapping, Sequence

from tests.awaits.stepping import Deed, Moment, Point

MOMENTS: tuple[Moment, ...] = ("waits", "goes on")


def choose(visits: Mapping[str, int], seed: int, deeds: Sequence[Deed]) -> list[Point]:
    """Choose the points of a run: which moment of a visit, and in which order, the seed gives.

    Args:
        visits: how often a process stood at each place, when nothing happened to it.
        seed: of all that is chosen.
        deeds: what is done there.
    """
    chance = random.Random(f"{seed}/points")
    points = []
    for place, count in sorted(visits.items()):
        first = chance.randrange(2)
        for deed in deeds:
            # At the only visit both moments; else the one at the first and the other at the last.
            points.append(Point(place, 1, MOMENTS[first], deed))
            points.append(Point(place, count, MOMENTS[1 - first], deed))
    chance.shuffle(points)
    return points


def sample(points: Sequence[Point], size: int) -> list[Point]:
    """Take some: of different places as long as there are any."""
    seen: dict[str, int] = {}
    ranked = []
    for number, point in enumerate(points):
        seen[point.place] = seen.get(point.place, 0) + 1
        ranked.append((seen[point.place], number, point))
    return [point for *_, point in sorted(ranked)[:size]]
