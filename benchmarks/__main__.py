"""`python -m benchmarks NAME`: runs one benchmark, prints its figures, and writes them as JSON.

Exit codes: 0 measured (whether or not a goal is met), 1 could not be measured, 2 bad usage.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import big, catch_up, drain, end_to_end, goals, idle, latency, poison
from benchmarks.report import Report, machine
from examples.demo.processes import DemoError


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = made.add_subparsers(dest="name", required=True, metavar="NAME")
    first = names.add_parser("latency", help=latency.TITLE, description=latency.TITLE)
    first.add_argument(
        "--source",
        choices=["plain", "stream", "windows"],
        default="stream",
        help="plain delivery, or the log by one of its transports (%(default)s)",
    )
    first.add_argument("--rate", type=_positive, default=100.0, help="changes a second (%(default)s)")
    first.add_argument("--seconds", type=_positive, default=20.0, help="length of a round (%(default)s)")
    first.add_argument(
        "--poll-interval",
        type=_positive,
        default=0.02,
        help="seconds between looks of the stand-in at its slot (%(default)s; the real server: 0.1)",
    )
    second = names.add_parser("drain", help=drain.TITLE, description=drain.TITLE)
    second.add_argument("--changes", type=_whole, default=50_000, help="backlog of a round (%(default)s)")
    second.add_argument(
        "--only",
        choices=[*(one.name for one in drain.WORKLOADS), "glue"],
        action="append",
        help="only this work",
    )
    fourth = names.add_parser("catch-up", help=catch_up.TITLE, description=catch_up.TITLE)
    fourth.add_argument("--changes", type=_whole, default=200_000, help="missed in a round (%(default)s)")
    fourth.add_argument("--rows", type=_whole, default=100, help="of each commit (%(default)s)")
    fourth.add_argument("--transport", choices=catch_up.TRANSPORTS, action="append", help="only this")
    fifth = names.add_parser("end-to-end", help=end_to_end.TITLE, description=end_to_end.TITLE)
    fifth.add_argument("--seconds", type=_positive, default=60.0, help="of the run (%(default)s)")
    fifth.add_argument(
        "--only", choices=sorted({one.kind for one in end_to_end.CASES}), action="append", help="only this"
    )
    for one in (fourth, fifth):
        one.add_argument("--workers", type=_whole, default=1, help="worker processes (%(default)s)")
    sixth = names.add_parser("idle", help=idle.TITLE, description=idle.TITLE)
    sixth.add_argument("--seconds", type=_positive, default=60.0, help="of all rounds together (%(default)s)")
    seventh = names.add_parser("poison", help=poison.TITLE, description=poison.TITLE)
    seventh.add_argument("--changes", type=_whole, default=20_000, help="backlog of a round (%(default)s)")
    seventh.add_argument("--share", type=_positive, default=0.01, help="of them poison (%(default)s)")
    seventh.add_argument("--only", choices=[*poison.KINDS], action="append", help="only this kind of handler")
    third = names.add_parser("big", help=big.TITLE, description=big.TITLE)
    third.add_argument("--rows", type=_whole, default=1_000_000, help="of the transaction (%(default)s)")
    third.add_argument("--transport", choices=["stream", "windows"], default="stream", help="(%(default)s)")
    third.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the daemon",
    )
    third.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    for one in (first, second, fourth, fifth, sixth, seventh):
        one.add_argument("--rounds", type=_whole, default=5, help="of which the median counts (%(default)s)")
        one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
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
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_run(options, report))
        except DemoError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        report.load_after = os.getloadavg()[0]
        report.seconds = round(time.monotonic() - began, 1)
        report.add_memory()
        goals.judge(report)
        print(report.text())
        if options.json is not None:
            options.json.write_bytes(report.json())
        return 0
    return 1


async def _run(options: argparse.Namespace, report: Report) -> None:
    if options.name == "latency":
        await latency.measure(
            report,
            source=options.source,
            rate=options.rate,
            seconds=options.seconds,
            rounds=options.rounds,
            poll_interval=options.poll_interval,
        )
    elif options.name == "big":
        await big.measure(report, rows=options.rows, transport=options.transport, settings=dict(options.set))
    elif options.name == "catch-up":
        await catch_up.measure(
            report,
            changes=options.changes,
            rounds=options.rounds,
            rows=options.rows,
            workers=options.workers,
            transports=options.transport or list(catch_up.TRANSPORTS),
        )
    elif options.name == "end-to-end":
        await end_to_end.measure(
            report,
            seconds=options.seconds,
            rounds=options.rounds,
            workers=options.workers,
            only=options.only,
        )
    elif options.name == "idle":
        await idle.measure(report, seconds=options.seconds, rounds=options.rounds)
    elif options.name == "poison":
        await poison.measure(
            report, changes=options.changes, share=options.share, rounds=options.rounds, only=options.only
        )
    else:
        await drain.measure(report, changes=options.changes, rounds=options.rounds, only=options.only)


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
