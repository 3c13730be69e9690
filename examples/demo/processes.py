"""The demo's child processes: started, watched, ended.

Each has a keeper beside it, which ends it when the demo is gone, however the demo ended. Their output goes to
log files. No supervisor: a child that ends by itself ends the demo.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from config.declared import declared_settings
from standin.embedded.process import ServerProcess

ROOT = Path(__file__).parents[2]
_READY_SECONDS = 90.0
_END_SECONDS = 8.0
_LOOK_SECONDS = 0.05
_SHOWN_LINES = 6
_SHOWN_CHARACTERS = 1_000

_T = TypeVar("_T")


class DemoError(Exception):
    """The demo cannot go on; the text says why, for the person who started it."""


class ChildEndedError(DemoError):
    """A child ended that should have gone on, or failed."""


class Child:
    """One child process and its log."""

    def __init__(self, name: str, process: ServerProcess, log: Path) -> None:
        self.name = name
        self.log = log
        self.ending = False
        self.unclean = False
        """Whether it was asked to end, and did so with another exit code than 0."""
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.ended.is_set()

    async def watch(self) -> None:
        """Return when it was ended by us.

        Raises:
            ChildEndedError: it ended by itself.
        """
        await self._process.ended.wait()
        if not self.ending:
            raise self.explained()

    async def succeed(self) -> None:
        """Wait for its end.

        Raises:
            ChildEndedError: with an exit code other than 0.
        """
        await self._process.ended.wait()
        if self._process.returncode:
            raise self.explained()

    def explained(self) -> ChildEndedError:
        """Say how it ended, with the end of its log."""
        code = self._process.returncode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildEndedError(
            "\n  ".join([f"the {self.name} {how}; its log ({self.log}) ends:", *self._tail()])
        )

    def _tail(self) -> list[str]:
        lines = [_readable(line) for line in self._text().splitlines()]
        return [line[:_SHOWN_CHARACTERS] for line in lines if line][-_SHOWN_LINES:] or ["(nothing)"]

    def _text(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except OSError:
            return ""

    async def said(self, find: Callable[[Mapping[str, Any]], _T | None]) -> _T:
        """Wait for a line of JSON in its log in which `find` finds something.

        Raises:
            ChildEndedError: it ended before.
            DemoError: it did not say so within a minute and a half.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            ended = self.ended
            for line in self._text().splitlines():
                found = find(_parsed(line))
                if found is not None:
                    return found
            if ended:
                raise self.explained()
            if time.monotonic() > deadline:
                raise DemoError(f"the {self.name} is not ready after {_READY_SECONDS:.0f} s: see {self.log}")
            # A file sends no signal when it grows.
            await asyncio.sleep(_LOOK_SECONDS)

    async def end(self) -> None:
        """End it in an orderly way; after a while, kill it."""
        running, self.ending = not self.ended, True
        await self._process.end(signal.SIGTERM, grace=_END_SECONDS)
        self.unclean = running and self._process.returncode != 0


class Children:
    """All of them. They live in a folder, where they also find no `.env`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Child] = []

    async def start(
        self, name: str, command: Sequence[str], settings: Mapping[str, str] | None = None
    ) -> Child:
        """Start a child with these settings and nobody else's."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        starting = asyncio.ensure_future(
            ServerProcess.start(
                list(command),
                log=log,
                stop_signal=signal.SIGTERM,
                cwd=self.folder,
                environment=_environment(os.environ, settings or {}),
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Half started is started: it must be known to `end`.
            self._started.append(Child(name, await starting, log))
            raise
        child = Child(name, process, log)
        self._started.append(child)
        return child

    async def end(self) -> list[Child]:
        """End all, those first that need the others; returns those that did not end cleanly."""
        stages: dict[bool, list[Child]] = {False: [], True: []}
        for child in self._started:
            stages[child is self._started[0]].append(child)
        for stage in stages.values():
            await asyncio.gather(*(child.end() for child in stage))
        return [child for child in self._started if child.unclean]


def _environment(inherited: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Keep what is the person's and the system's; drop what would tell a child of another project."""
    foreign = {name for setting in declared_settings() for name in (setting.name, *setting.aliases)}
    kept = {
        name: value
        for name, value in inherited.items()
        if name.upper() not in foreign and not name.upper().startswith(("WORKER_", "PG"))
    }
    paths = _joined(os.pathsep, [str(ROOT), kept.get("PYTHONPATH", "")])
    # A proxy would be asked for the way to our own loopback.
    direct = _joined(",", ["127.0.0.1", "localhost", kept.get("NO_PROXY", kept.get("no_proxy", ""))])
    return {
        **kept,
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
        **settings,
    }


def _joined(separator: str, parts: Iterable[str]) -> str:
    return separator.join(part for part in parts if part)


def _parsed(line: str) -> Mapping[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _readable(line: str) -> str:
    """Turn a line of our JSON logs into one for people; nothing of what is JSON, but no log."""
    content = dict(_parsed(line))
    if "message" not in content:
        return "" if content else line.rstrip()
    level, message = content.pop("level", ""), content.pop("message")
    for name in ("time", "logger"):
        content.pop(name, None)
    more = " ".join(f"{name}={value}" for name, value in content.items())
    return f"{level}: {message} {more}".rstrip().replace("\n", "\n    ")
