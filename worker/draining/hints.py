"""What is known of a handler's failures before a list is taken apart: how many there are, whom to suspect.

Guesses, and used as such: they say in which order items are called and how many at a time. Nobody is held for
a guess: who is suspected is called alone, and the innocent are called again without it.
"""

import sysconfig
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Final

from sqlalchemy import Row

from worker.change import Change

_LIBRARIES: Final = tuple(
    sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OURS: Final = "worker."
_REMEMBERED: Final = 5_000
"""Items: what is older counts half, and so on."""
_FEW: Final = 3
"""Failures, from which nothing follows yet."""
_MOST_PARTS: Final = 32
"""Values in a local variable that are looked at: a row has some, a list of rows has too many."""


class Odds:
    """What the failures of one handler have been so far, in this process."""

    def __init__(self) -> None:
        self._items = 0.0
        self._guilty = 0.0
        self._right = 0
        self._wrong = 0

    def count(self, items: int, guilty: int) -> None:
        """Count what was called with care, and how many of those failed."""
        self._items += items
        self._guilty += guilty
        if self._items > _REMEMBERED:
            self._items, self._guilty = self._items / 2, self._guilty / 2
            self._right, self._wrong = self._right // 2, self._wrong // 2

    def suspected(self, *, rightly: bool) -> None:
        """Count a suspicion."""
        self._right, self._wrong = self._right + rightly, self._wrong + (not rightly)

    @property
    def tells(self) -> bool:
        """Whether it pays to ask an error whom it is about."""
        return self._wrong <= 2 + self._right  # two may be wrong by chance

    def segment(self, most: int) -> int:
        """How many to call at once: so many that about every other call succeeds.

        More would fail nearly always, fewer would seldom: neither tells much about anybody. Where errors say
        whom they are about, more may fail together.
        """
        if self._guilty < _FEW:
            return most
        if self._guilty > self._items / 2:
            return 1
        expected = 2.0 if self._right > self._wrong else 0.7
        return min(most, max(1, round(expected * self._items / self._guilty)))


def suspect(error: BaseException, arguments: Sequence[object]) -> int | None:
    """Find the one of a handler's arguments that an error is about; None where it does not tell.

    Who goes through a list one by one has the present one in a local variable when an error is raised: the
    change, its row, a key, or a row that was read for a key.
    """
    known = _by_identity(arguments)
    frames: list[FrameType] = []
    found = error.__traceback__
    while found is not None:
        frames.append(found.tb_frame)
        found = found.tb_next
    for frame in reversed(frames):
        code = frame.f_code.co_filename
        if code.startswith(_LIBRARIES) or frame.f_globals.get("__name__", "").startswith(_OURS):
            continue
        named = {
            index for value in list(frame.f_locals.values()) if (index := _named(value, known)) is not None
        }
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _by_identity(arguments: Sequence[object]) -> dict[object, int]:
    known: dict[object, int] = {}
    for n, argument in enumerate(arguments):
        if isinstance(argument, Change):
            rows = (argument, argument.record, argument.old_record)
            known |= {id(row): n for row in rows if row is not None}
        elif isinstance(argument, Hashable):
            known[type(argument), argument] = n
    return known


def _named(value: object, known: Mapping[object, int]) -> int | None:
    """Find the only one that a value names, as it is or as a part of it."""
    found: set[int] = set()
    for part in (value, *_parts(value)):
        if (index := known.get(id(part))) is not None:
            found.add(index)
        elif isinstance(part, int | str | tuple) or type(part).__module__ in ("uuid", "datetime", "decimal"):
            try:
                index = known.get((type(part), part))
            except TypeError:  # a tuple of what cannot be hashed
                continue
            if index is not None:
                found.add(index)
    return found.pop() if len(found) == 1 else None


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, Mapping) and len(value) <= _MOST_PARTS:
        yield from value.values()
    elif isinstance(value, tuple | Row) and len(value) <= _MOST_PARTS:
        yield from value
    elif hasattr(type(value), "__mapper__"):
        yield from vars(value).values()
