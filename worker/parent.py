"""Ends a process with the one that started it, however that one died: a killed parent ends nothing by itself.

As `python -m worker.parent SECONDS MODULE ARGUMENTS…` it runs a module as `python -m` does, and ends it in
good order once its standard input ends. The parent holds the other end of that pipe and never writes: the
system closes it at the parent's death, also at one before this process has begun.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.5


def end_with_input(seconds: float) -> None:
    """End this process as by SIGTERM when standard input ends; so many seconds later, kill it.

    What runs here finds standard input empty: it cannot take the pipe for its own, or hand it on.
    """
    pipe = os.dup(sys.stdin.fileno())  # not inherited
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)

    def gone() -> None:
        while os.read(pipe, 4096):
            pass

    _watch(gone, seconds)


def end_with_parent(parent: int, seconds: float) -> None:
    """End this process as by SIGTERM when it is no longer a child of `parent`; later, kill it.

    For a parent that gives no pipe. One that is gone already counts as gone.
    """

    def gone() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)

    _watch(gone, seconds)


def _watch(gone: Callable[[], None], seconds: float) -> None:
    def watch() -> None:
        gone()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        # Nobody is left who would do it.
        os.kill(os.getpid(), signal.SIGKILL)

    # A thread: it hears of the end also while imports or a handler have the event loop.
    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    """Run the module that the arguments name."""
    seconds, module, *arguments = sys.argv[1:]
    end_with_input(float(seconds))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()


__all__ = ["end_with_input", "end_with_parent"]
