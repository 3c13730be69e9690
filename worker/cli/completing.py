"""What the shell is offered beyond commands and options: names of handlers and of their tables.

As HANDLERS names them, from the current directory; no database is asked. Whatever goes wrong, nothing is
offered: who presses a key in the midst of a line wants no traceback.
"""

import contextlib
import io

__all__ = ["handlers", "tables"]


def handlers(incomplete: str) -> list[str]:
    """Offer names of handlers."""
    return [name for name in _names()[0] if name.startswith(incomplete)]


def tables(incomplete: str) -> list[str]:
    """Offer tables that handlers follow, as schema.table."""
    return [name for name in _names()[1] if name.startswith(incomplete)]


def _names() -> tuple[list[str], list[str]]:
    # Modules may print while they are imported; the shell would take that for words to offer.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        from config.settings import load_tunables  # noqa: PLC0415 - `--help` needs none of it
        from worker.loader import load  # noqa: PLC0415 - as above

        found = load(load_tunables().handlers)
        followed = {one.qualified for handler in found for one in handler.subscriptions}
        return sorted(handler.name for handler in found), sorted(followed)
    return [], []
