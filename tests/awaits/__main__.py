"""`python -m tests.awaits --process worker --seed 3`: struck at every await, and everything is accounted for.

Exit codes: 0 all is accounted for, 1 it is not.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.awaits.run import Outcome, run
from tests.stack import servers

_BEGAN = time.monotonic()


def _tell(line: str) -> None:
    sys.stdout.write(f"[{time.monotonic() - _BEGAN:5.0f} s] {line}\n")
    sys.stdout.flush()


async def _run(folder: Path, options: argparse.Namespace) -> Outcome:
    async with servers(folder) as own:
        return await run(
            own,
            options.process,
            seed=options.seed,
            deeds=options.deed,
            most=options.most,
            only=options.only,
            at_once=options.at_once,
            tell=_tell,
        )


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.awaits", description=__doc__)
    parser.add_argument("--process", choices=("listener", "worker"), required=True, help="which is struck")
    parser.add_argument(
        "--deed",
        choices=("kill", "stop", "flush"),
        nargs="+",
        default=["kill"],
        help="what is done to it (kill)",
    )
    parser.add_argument("--seed", type=int, default=3, help="of the points and their order (%(default)s)")
    parser.add_argument("--most", type=int, metavar="N", help="points (all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="places with this in their names")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="projects (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="awaits-") as folder:
        outcome = asyncio.run(_run(Path(folder), options))
    for point in outcome.missed:
        _tell(f"not come by: {point}")
    for point, error in outcome.failed:
        _tell(f"FAILED: {point}: {error}")
    _tell(
        f"seed {options.seed}: the {options.process} struck {len(outcome.struck)} times, at"
        f" {len(outcome.places)} of {len(outcome.counted)} places; {len(outcome.missed)} points not come by,"
        f" {len(outcome.failed)} FAILED"
    )
    return int(bool(outcome.failed))


if __name__ == "__main__":
    raise SystemExit(main())
