"""`python -m worker` and the console script `tailrace`: the entry, and what an error looks like from outside.

Bad input is a line on standard error and exit code 2, never a traceback. The commands are in
`worker.cli`.
"""

import sys
from pathlib import Path

from worker.cli.app import app
from worker.errors import ConfigurationError


def main() -> None:
    """Run the command line; ends the process: 0 fine, 1 found problems, 2 bad usage or configuration."""
    here = str(Path.cwd())
    if here not in sys.path:
        # `python -m worker` finds handlers in the current directory; the console script must do so too.
        sys.path.insert(0, here)
    try:
        app()
    except ConfigurationError as error:
        from worker.cli.printing import show_problem  # noqa: PLC0415 - `--help` needs none of it

        for problem in error.problems:
            show_problem(problem)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
