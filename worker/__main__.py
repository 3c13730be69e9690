"""`python -m worker` and the console script `tailrace`: the entry, and what an error looks like from outside.

Bad input is a line on standard error and exit code 2, never a traceback. The commands are in
`worker.cli`.
"""

import sys

from worker.cli import completing
from worker.cli.app import app
from worker.errors import ConfigurationError
from worker.search_path import search_here_first

_COMPLETION = {"--install-completion", "--show-completion"}


def main() -> None:
    """Run the command line; ends the process: 0 fine, 1 found problems, 2 bad usage or configuration."""
    try:
        search_here_first()
        # What a shell completes is the console script, by whichever name this is called now.
        with completing.words_of_bash(), completing.script_of_zsh(sys.argv):
            app(prog_name="tailrace" if _COMPLETION.intersection(sys.argv) else None)
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"tailrace: {' '.join(problem.split())}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
