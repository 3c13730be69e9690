"""`python -m benchmarks NAME`: runs one benchmark, or all, prints the figures, and writes them as JSON.

Exit codes: 0 measured (whether or not a goal is met, and also where a case failed: the figures say so), 1 not
measured, 2 bad usage. Progress goes to standard error.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import (
    backfill,
    big,
    catch_up,
    drain,
    end_to_end,
    goals,
    idle,
    latency,
    plot,
    poison,
    scale,
    suite,
)
from benchmarks.contenders import FAILURES
from benchmarks.report import Report, machine


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = made.add_subparsers(dest="name", required=True, metavar="NAME")

    def add(name: str, title: str) -> argparse.ArgumentParser:
        one = names.add_parser(name, help=title, description=title)
        one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        one.add_argument("--markdown", type=Path, metavar="FILE", help="write them there as tables")
        one.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates there, as SVG")
        if name not in ("big", "backfill"):
            one.add_argument("--rounds", type=_whole, default=5, help="whose median counts (%(default)s)")
        return one

    every = add("all", suite.TITLE)
    every.add_argument(
        "--share", type=_positive, default=1.0, help="of the sizes and times, to try it out (%(default)s)"
    )
    every.add_argument("--only", choices=suite.NAMES, action="append", help="only this benchmark")

    draining = add("drain", drain.TITLE)
    draining.add_argument("--changes", type=_whole, default=50_000, help="backlog of a round (%(default)s)")
    kinds = [*(one.name for one in drain.WORKLOADS), "glue"]
    draining.add_argument("--only", choices=kinds, action="append", help="only this work")

    late = add("latency", latency.TITLE)
    late.add_argument("--source", choices=latency.KINDS, action="append", help="only this (all)")
    late.add_argument("--work", choices=latency.WORKS, action="append", help="only this (both, of ours)")
    late.add_argument(
        "--rate", type=_positive, action="append", help="changes a second (1, 50, 200 and 1000)"
    )
    late.add_argument("--seconds", type=_positive, default=10.0, help="length of a round (%(default)s)")
    late.add_argument(
        "--poll-interval",
        type=_positive,
        default=0.02,
        help="seconds between looks of the stand-in at its slot (%(default)s; the real server: 0.1)",
    )

    missed = add("catch-up", catch_up.TITLE)
    missed.add_argument("--changes", type=_whole, default=200_000, help="missed in a round (%(default)s)")
    missed.add_argument("--rows", type=_whole, default=100, help="of each commit (%(default)s)")
    missed.add_argument("--transport", choices=catch_up.TRANSPORTS, action="append", help="only this")

    whole = add("end-to-end", end_to_end.TITLE)
    whole.add_argument("--seconds", type=_positive, default=60.0, help="of the run (%(default)s)")
    sources = sorted({one.kind for one in end_to_end.CASES})
    whole.add_argument("--source", choices=sources, action="append", help="only this (all)")
    for one in (missed, whole):
        one.add_argument("--workers", type=_whole, default=1, help="worker processes (%(default)s)")

    idling = add("idle", idle.TITLE)
    idling.add_argument(
        "--seconds", type=_positive, default=60.0, help="of all rounds together (%(default)s)"
    )

    scaling = add("scale", scale.TITLE)
    scaling.add_argument("--changes", type=_whole, default=20_000, help="of most backlogs (%(default)s)")
    scaling.add_argument(
        "--largest", type=_whole, default=max(scale.BACKLOGS), help="of the backlogs (%(default)s)"
    )
    scaling.add_argument("--only", choices=[*scale.GROUPS], action="append", help="only this")

    poisoned = add("poison", poison.TITLE)
    poisoned.add_argument("--changes", type=_whole, default=20_000, help="backlog of a round (%(default)s)")
    poisoned.add_argument("--share", type=_positive, default=0.01, help="of them poison (%(default)s)")
    poisoned.add_argument("--only", choices=[*poison.KINDS], action="append", help="only this handler")

    huge = add("big", big.TITLE)
    huge.add_argument("--rows", type=_whole, default=1_000_000, help="of the transaction (%(default)s)")
    huge.add_argument("--transport", choices=["stream", "windows"], default="stream", help="(%(default)s)")
    huge.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the daemon",
    )

    filling = add("backfill", backfill.TITLE)
    filling.add_argument("--rows", type=_whole, default=1_000_000, help="of the table (%(default)s)")
    filling.add_argument(
        "--rate", type=_positive, default=500.0, help="changes a second meanwhile (%(default)s)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the process's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    report = Report(
        name=options.name,
        command=shlex.join(["python", "-m", "benchmarks", *given]),
        machine=machine(),
        load_before=os.getloadavg()[0],
    )
    print(report.machine)
    running = _Running(report, options.json)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_run(options, report, running))
        except FAILURES as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        judged = running.save()
        print(judged.text())
        if options.markdown is not None:
            options.markdown.write_text(judged.markdown())
        if options.plot is not None:
            options.plot.write_text(plot.drawn(judged))
        return 0
    return 1


class _Running:
    """A run whose figures so far can be written at any time."""

    def __init__(self, report: Report, path: Path | None) -> None:
        self._report = report
        self._path = path
        self._began = time.monotonic()

    def save(self) -> Report:
        """Write the figures so far, held against the goals; returns them."""
        report = self._report
        judged = replace(report, results=list(report.results), goals=list(report.goals))
        judged.load_after = os.getloadavg()[0]
        judged.seconds = round(time.monotonic() - self._began, 1)
        judged.add_memory()
        goals.judge(judged)
        if self._path is not None:
            self._path.write_bytes(judged.json())
        return judged


async def _run(options: argparse.Namespace, report: Report, running: _Running) -> None:
    match options.name:
        case "all":
            await suite.measure(
                report, rounds=options.rounds, share=options.share, only=options.only, measured=running.save
            )
        case "latency":
            await latency.measure(
                report,
                kinds=options.source or latency.KINDS,
                rates=options.rate or latency.RATES,
                works=options.work or latency.WORKS,
                seconds=options.seconds,
                rounds=options.rounds,
                poll_interval=options.poll_interval,
            )
        case "drain":
            await drain.measure(report, changes=options.changes, rounds=options.rounds, only=options.only)
        case "catch-up":
            await catch_up.measure(
                report,
                changes=options.changes,
                rounds=options.rounds,
                rows=options.rows,
                workers=options.workers,
                transports=options.transport or catch_up.TRANSPORTS,
            )
        case "end-to-end":
            await end_to_end.measure(
                report,
                seconds=options.seconds,
                rounds=options.rounds,
                workers=options.workers,
                only=options.source,
            )
        case "idle":
            await idle.measure(report, seconds=options.seconds, rounds=options.rounds)
        case "scale":
            await scale.measure(
                report,
                changes=options.changes,
                largest=options.largest,
                rounds=options.rounds,
                only=options.only,
            )
        case "poison":
            await poison.measure(
                report,
                changes=options.changes,
                share=options.share,
                rounds=options.rounds,
                only=options.only,
            )
        case "backfill":
            await backfill.measure(report, rows=options.rows, rate=options.rate)
        case _:
            settings = dict(options.set)
            await big.measure(report, rows=options.rows, transport=options.transport, settings=settings)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text!r}")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if equals and name:
        return name, value
    raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, not {text!r}")


def _whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"a whole number above 0 is wanted, not {text!r}")


if __name__ == "__main__":
    raise SystemExit(main())
