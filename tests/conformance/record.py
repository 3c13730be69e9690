"""Writes the promised frames of our own scenarios anew, from the stand-in as it is now.

Run by hand, `python -m tests.conformance.record [NAME...]`, after the suite agreed with the recordings,
never by a
test: a test that records its own expectation cannot fail. Read the difference before committing it.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.conformance import scenario_file
from tests.conformance.frames import Frame, Labels, normalise
from tests.conformance.player import Player, Server
from tests.conformance.script import Receive, Refused, Script, Step
from tests.conformance.servers import cluster, database, serving


class Recorder(Player):
    """A player that says which frames came after each step, to write the promises of our own scenarios."""

    # The server counts whole seconds until the end.
    margin = 1.3

    def __init__(self, script: Script, server: Server) -> None:
        super().__init__(script, server)
        self._labels = Labels(is_now=lambda _text: False)
        self._told = 0

    async def after(self, steps: list[Step]) -> list[tuple[str, Frame]]:
        """Do the steps and return the frames that came, each with its connection."""
        for step in steps:
            await self.do(step)
        if steps:
            # Twice: an acknowledgement is sent when the feed is live, which the first fence only waits for.
            await self.fence()
            await self.fence()
        new, self._told = self.log[self._told :], len(self.log)
        return [(name, normalise(raw, self._labels)) for name, raw in new]

    def refusals(self) -> list[tuple[str, tuple[int, str]]]:
        """Handshakes refused since the last call."""
        found, self.seen.refused = [*self.seen.refused.items()], {}
        return found

    def take_failures(self) -> list[tuple[str, str]]:
        """Statements whose outcome was not the one the script names, since the last call."""
        found, self.seen.failures = self.seen.failures, []
        return found


async def main(names: list[str]) -> None:
    """Record the named scenarios, or all."""
    with tempfile.TemporaryDirectory() as folder:
        async with cluster(Path(folder)) as postgres:
            for name in names or scenario_file.names():
                script = scenario_file.load(name)
                async with database(postgres) as url, serving(url, script.settings) as server:
                    await _record(script, server)
                sys.stdout.write(f"{name}\n")


async def _record(script: Script, server: Server) -> None:
    commits: dict[str, str] = {}
    versions: dict[str, str] = {}
    written: list[str] = []
    async with Recorder(Script(script.name, tokens=script.tokens), server) as recorder:
        for line in scenario_file.lines(script.name):
            steps = [*scenario_file.steps_of(line, script, versions)]
            if any(isinstance(step, Receive | Refused) for step in steps):
                continue
            written.append(line)
            for conn, frame in await recorder.after(steps):
                label = commits.setdefault(frame.commit, f"@{len(commits) + 1}") if frame.commit else "-"
                written.append(f"< {conn} {label} {frame.text}")
            written += [f"refused {conn} {status} {body}" for conn, (status, body) in recorder.refusals()]
            _refuse(line, recorder)
        await recorder.finish()
    path = scenario_file.FOLDER / f"{script.name}.scenario"
    path.write_text("\n".join(written))


def _refuse(line: str, recorder: Recorder) -> None:
    """Stop before anything is written: a statement that went wrong makes the rest another story."""
    for statement, problem in recorder.take_failures():
        raise SystemExit(f"{line[:40]!r}: {statement[:60]!r}: {problem}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
