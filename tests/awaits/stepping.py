"""Runs in the child: counts where the project's coroutines stand still, and strikes at a chosen one.

Each task of the event loop is driven through an object that sees every suspension and every resumption. What
stands still without a line of `worker/` that waits is somebody else's.
"""

import asyncio
import gc
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import Any, Literal, NamedTuple

import uvloop

_ROOT = Path(__file__).parent.parent.parent
_OURS = f"{_ROOT / 'worker'}{os.sep}"

Moment = Literal["waits", "goes on"]
"""`waits`: what is waited for has been asked for, and perhaps not even sent. `goes on`: it has come."""
Deed = Literal["kill", "stop", "flush"]
"""`kill`: it is dead. `stop`: it sleeps, and another takes over. `flush`: it sleeps, and Redis forgets."""


class Point(NamedTuple):
    """Where a process is struck."""

    place: str
    visit: int
    """The how-many-th time that it stands there, from 1."""
    moment: Moment
    deed: Deed

    def __str__(self) -> str:
        return f"{self.deed} at {self.place}, visit {self.visit}, when it {self.moment}"


def _frames(awaitable: Any) -> Generator[tuple[str, int, CodeType], None, None]:
    """Walk from a task's coroutine to what it waits for: file, line, code of each frame."""
    while awaitable is not None:
        match awaitable:
            case CoroutineType():
                frame, code, inner = awaitable.cr_frame, awaitable.cr_code, awaitable.cr_await
            case AsyncGeneratorType():
                frame, code, inner = awaitable.ag_frame, awaitable.ag_code, awaitable.ag_await
            case GeneratorType():
                frame, code, inner = awaitable.gi_frame, awaitable.gi_code, awaitable.gi_yieldfrom
            case _:
                # `anext()` and `__await__` are objects that tell only the collector what they hold.
                held = gc.get_referents(awaitable)
                awaitable = next((one for one in held if isinstance(one, _WALKED)), None)
                continue
        if frame is not None:
            yield code.co_filename, frame.f_lineno, code
        awaitable = inner


_WALKED = (CoroutineType, AsyncGeneratorType, GeneratorType)


def place_of(awaitable: Any) -> str | None:
    """Name where a task stands still; None where no line of ours waits.

    It is the innermost line of ours, the one that called it, and what it waits in: entering and leaving a
    block are one line, and two things to wait for.
    """
    ours: list[str] = []
    waits_in = ""
    for file, line, code in _frames(awaitable):
        if file.startswith(_OURS):
            ours.append(f"{file[len(_OURS) :]}:{line}")
            waits_in = ""
        elif ours and not waits_in:
            waits_in = getattr(code, "co_qualname", code.co_name)
    return " < ".join([*reversed(ours[-2:]), waits_in]) if ours else None


class Watch:
    """Counts, and strikes.

    Args:
        report: a descriptor to write to what was done and, in the end, what was counted.
        point: where to strike; None only counts.
        late: as soon as this file is there, any visit of the place will do: how many there are differs.
    """

    def __init__(self, report: int, point: Point | None, late: Path | None = None) -> None:
        self._report = report
        self._point = point
        self._late = late
        self._visits: Counter[str] = Counter()

    def loop(self) -> uvloop.Loop:
        """Make a loop whose tasks are watched."""
        loop = uvloop.Loop()
        loop.set_task_factory(self._task)
        return loop

    def _task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(Stepped(coro, self), loop=loop, **options)

    def waits(self, place: str) -> int:
        """Note that a task stands still; returns which visit of the place it is."""
        self._visits[place] += 1
        self.meet(place, self._visits[place], "waits")
        return self._visits[place]

    def meet(self, place: str, visit: int, moment: Moment) -> None:
        """Strike if this is where."""
        point = self._point
        if point is None or (place, moment) != (point.place, point.moment):
            return
        if visit != point.visit and not (self._late is not None and self._late.exists()):
            return
        self._point = None
        self._tell(struck=str(point))
        os.kill(os.getpid(), signal.SIGKILL if point.deed == "kill" else signal.SIGSTOP)

    def counted(self) -> None:
        """Report what was counted."""
        self._tell(visits=dict(self._visits))

    def _tell(self, **what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(self._report, data) :]


class Stepped(Coroutine[Any, Any, Any]):
    """A task's coroutine, seen at each step."""

    def __init__(self, inner: Coroutine[Any, Any, Any], watch: Watch) -> None:
        self._inner = inner
        self._watch = watch
        self._at: tuple[str, int] | None = None

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        if self._at is not None:
            self._watch.meet(*self._at, "goes on")
            self._at = None
        awaited = step(*arguments)
        if (place := place_of(self._inner)) is not None:
            self._at = place, self._watch.waits(place)
        return awaited
