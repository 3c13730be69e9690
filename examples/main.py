"""`make run`: the main job on the configured project, or, where nothing is configured, the demo.

Decides only which of the two. The settings are read and judged by `config.settings`. Where `make` has started
it, it ends with `make`, also with one that is killed.
"""

import os
import sys
from collections.abc import Mapping

from dotenv import dotenv_values  # pydantic-settings reads .env with it

from config.problems import environment_names
from config.settings import Settings, Tunables
from worker.parent import end_with_parent

PROGRAM = "make run"
STARTED_BY = "STARTED_BY"
"""Variable in which make tells its process id."""
END_SECONDS = 60.0
"""After so long without make it is killed: well above the default of `WORKER_DRAIN_SECONDS`."""


def main(arguments: list[str]) -> int:
    """Run what is configured; the exit code."""
    # Taken out: nobody else is make's own child.
    started_by = os.environ.pop(STARTED_BY, "")
    if started_by.isdecimal():
        end_with_parent(int(started_by), END_SECONDS)
    named = configured(os.environ, dotenv_values(".env"))
    if not named:
        from examples.demo.__main__ import main as demo  # noqa: PLC0415 - a configured project needs no stand-in

        return demo(arguments, PROGRAM)
    if arguments:
        told = f"takes no arguments when a project is configured ({', '.join(named)})"
        sys.stderr.write(f"{PROGRAM} {told}; the demo is `python -m examples.demo`\n")
        return 2
    return _run(named)


def configured(environment: Mapping[str, str], env_file: Mapping[str, str | None]) -> list[str]:
    """List the settings of a project that are set: those without which there is none, and their aliases."""
    of_a_project = {
        name
        for field, declared in Settings.model_fields.items()
        if field not in Tunables.model_fields
        for name in environment_names(declared)
    }
    given = {name.upper() for source in (environment, env_file) for name, value in source.items() if value}
    return sorted(given & of_a_project)


def _run(named: list[str]) -> int:
    from worker.cli import commands  # noqa: PLC0415 - the demo must not load the daemon
    from worker.cli.printing import show_problem  # noqa: PLC0415 - as above
    from worker.errors import ConfigurationError  # noqa: PLC0415 - as above

    try:
        return commands.run()
    except ConfigurationError as error:
        for problem in error.problems:
            show_problem(problem)
        sys.stderr.write(
            f"tailrace: set: {', '.join(named)}; with no setting of a project, `{PROGRAM}` is the demo\n"
        )
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
