"""`python -m examples.demo`: options, signals, exit code.

Exit codes: 0 ended as asked and everything equal, 1 a difference or a part that failed, 2 bad usage.
"""

import argparse
import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from examples.demo.play import Demo, Options
from examples.demo.processes import DemoError
from examples.demo.view import View

_IMPATIENT = 130


def parser(program: str = "python -m examples.demo") -> argparse.ArgumentParser:
    """Build the command line."""
    made = argparse.ArgumentParser(
        prog=program,
        description="An example shop writes orders; Tailrace derives the totals of customers and a log of"
        " statuses. Everything runs on this machine, and nothing stays behind.",
    )
    made.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        metavar="SECONDS",
        help="close the shop after so long, compare what was derived with what it should be, and end",
    )
    made.add_argument(
        "--rate", type=_rate, default=250.0, metavar="N", help="changes a second (default: %(default)g)"
    )
    made.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="worker processes (default: %(default)s)"
    )
    made.add_argument(
        "--keep-data", type=Path, metavar="DIR", help="put logs and data into this new folder, and keep them"
    )
    return made


def main(arguments: Sequence[str] | None = None, program: str = "python -m examples.demo") -> int:
    """Run the demo; its exit code."""
    given = parser(program).parse_args(arguments)
    # Postgres drivers read PG… variables: those are about somebody's own database.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    return asyncio.run(_run(Options(given.seconds, given.rate, given.workers, given.keep_data)))


async def _run(options: Options) -> int:
    with View(options.seconds) as view:
        try:
            demo = Demo(options, view)
        except DemoError as error:
            view.say(f"demo: {error}", "bold red")
            return 2
        playing = asyncio.create_task(demo.play(), name="demo")
        stopped = _stop_on_signals(playing)
        try:
            return await playing
        except DemoError as error:
            view.say(f"demo: {error}", "bold red")
            return 1
        except asyncio.CancelledError:
            if not stopped.is_set():
                raise
            view.say(f"stopped; the shop had written {demo.written:,} changes")
            return 0


def _stop_on_signals(playing: "asyncio.Task[int]") -> asyncio.Event:
    """Let the first signal end the play in good order, and the second one at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopped.is_set():
            # The keepers see that we are gone and end the children.
            os._exit(_IMPATIENT)
        stopped.set()
        playing.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    return stopped


def _seconds(text: str) -> float:
    return _number(text, 1, 86_400, "seconds are a number from 1 to 86400")


def _rate(text: str) -> float:
    return _number(text, 1, 100_000, "changes a second are a number from 1 to 100000")


def _workers(text: str) -> int:
    number = _number(text, 1, 32, "workers are a whole number from 1 to 32")
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"workers are a whole number from 1 to 32, not {text!r}")
    return int(number)


def _number(text: str, least: float, most: float, rule: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{rule}, not {text!r}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
