"""`python -m tests.chaos --seed 7 --seconds 120`: everything dies at random, and nothing is lost.

Exit codes: 0 all is accounted for, 1 it is not.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import chaos

_BEGAN = time.monotonic()


def _tell(line: str) -> None:
    sys.stdout.write(f"[{time.monotonic() - _BEGAN:5.0f} s] {line}\n")
    sys.stdout.flush()


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="of the faults and the changes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (%(default)s)")
    parser.add_argument("--rate", type=float, default=400.0, help="changes a second, at most (%(default)s)")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between faults (%(default)s)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of the processes there")
    options = parser.parse_args()
    outcome = None
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            outcome = asyncio.run(
                chaos(
                    Path(folder),
                    seed=options.seed,
                    seconds=options.seconds,
                    rate=options.rate,
                    every=options.every,
                    settling=max(300.0, 5 * options.seconds),  # what a small machine needs to catch up
                    tell=_tell,
                    logs=options.logs,
                )
            )
        except* AssertionError as failed:
            for error in _leaves(failed):
                _tell(f"FAILED with seed {options.seed}: {error}")
    if outcome is None:
        return 1
    _tell(
        f"seed {options.seed}: {outcome.committed} changes, {len(outcome.planned)} faults,"
        f" {outcome.commits_of_unknown_fate} commits looked up; all accounted for"
        f" {outcome.settled_after:.1f} s after the last commit"
    )
    for line in outcome.died:
        _tell(f"started again, though nobody had killed it: {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
