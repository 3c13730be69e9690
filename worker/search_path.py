"""Where people's modules are found: in the working directory, before everything that is installed.

All processes look there first, however they were started: listener and workers must load the same handlers.
"""

import sys
from pathlib import Path

from worker.errors import ConfigurationError

HOME = Path(__file__).resolve().parent.parent
OURS = ("config", "migrations", "standin", "worker")
"""Names at the top that are taken: they are imported from HOME."""


def search_here_first() -> None:
    """Put the working directory first on sys.path.

    `python -m` has it there already, the command `tailrace` has it nowhere, and arq's puts it last.

    Raises:
        ConfigurationError: a module there has the name of a package of ours, and one would hide the other.
    """
    here = Path.cwd()
    if here != HOME:
        taken = [found for name in OURS if (found := _module(here, name))]
        if taken:
            raise ConfigurationError(
                f"{found} has the name of a package of Tailrace: rename it, or start in another directory"
                for found in taken
            )
    place = str(here)
    # The empty string is the working directory, too, wherever that is at the moment.
    sys.path[:] = [place, *(entry for entry in sys.path if entry not in {place, ""})]


def _module(folder: Path, name: str) -> str:
    """Return the file that is imported by this name. A folder without __init__.py hides nothing."""
    candidates = (Path(name, "__init__.py"), Path(f"{name}.py"))
    return next((str(file) for file in candidates if (folder / file).is_file()), "")
