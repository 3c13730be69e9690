"""What the shell is offered beyond commands and options: names of handlers and of their tables.

As HANDLERS names them, from the current directory; no database is asked. Whatever goes wrong, nothing is
offered: who presses a key in the midst of a line wants no traceback.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["handlers", "script_of_zsh", "tables", "words_of_bash"]

_BREAKS = frozenset(":=")
_AT_ONCE = """
if [[ $funcstack[1] = _tailrace ]]; then _tailrace_completion "$@"; fi
"""


@contextlib.contextmanager
def words_of_bash() -> Iterator[None]:
    """Let bash complete names with a colon, as those of handlers are: for it a colon ends a word.

    Its words are put together again, and what is offered loses all up to the colon, for bash replaces only
    what comes after it.
    """
    words, current = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    if os.environ.get("_TAILRACE_COMPLETE") != "complete_bash" or not current.isdecimal():
        yield
        return
    joined, place = _joined(words, int(current))
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(place)
    # What stands before an equals sign is an option, and never part of what is offered.
    word = joined[place].rpartition("=")[2] if place < len(joined) else ""
    cut = word[: word.rfind(":") + 1] if joined != words else ""
    offered = io.StringIO()
    try:
        with contextlib.redirect_stdout(offered):
            yield
    finally:
        sys.stdout.writelines(line.removeprefix(cut) for line in offered.getvalue().splitlines(keepends=True))


@contextlib.contextmanager
def script_of_zsh(arguments: Sequence[str]) -> Iterator[None]:
    """Let the script for zsh complete at the first key, too, where a file of completions has it.

    zsh loads such a file at the first key, and expects it to complete; typer's only defines how.
    """
    shown = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(shown)
            if "--show-completion" in arguments
            else contextlib.nullcontext()
        ):
            yield
    finally:
        script = shown.getvalue()
        sys.stdout.write(script + _AT_ONCE if "#compdef" in script else script)
        file = Path.home() / ".zfunc/_tailrace"
        if "--install-completion" in arguments and file.is_file() and _AT_ONCE not in file.read_text():
            file.write_text(f"{file.read_text().rstrip()}\n{_AT_ONCE}")


def _joined(words: Sequence[str], current: int) -> tuple[list[str], int]:
    """Put together what was cut at colons and equals signs; gives the words, and which is the current one."""
    joined: list[str] = []
    place, before = current, ""
    for index, word in enumerate(words):
        if joined and word and (_is_break(word) or _is_break(before)):
            joined[-1] += word
        else:
            joined.append(word)
        if index == current:
            place = len(joined) - 1
        before = word
    return joined, place


def _is_break(word: str) -> bool:
    return bool(word) and _BREAKS.issuperset(word)


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
