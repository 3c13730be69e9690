"""The exceptions of the project. Nothing else lives here, so that every module may import it.

TailraceError
├── ConfigurationError      settings or handlers that a restart cannot mend: exit code 2
├── HandlerProblem          one thing wrong in the declaration of one handler; the loader collects them
├── FilterError             a filter that cannot be read or does not fit its table
├── MalformedChange         a payload that is no change
├── NewerFormat             written by a newer version, which this one cannot read
├── Refused                 what a person asked for cannot be done; one line that says why
│   └── Unknown             there is no dead letter, handler or paused key of that name
├── MissingValueError       a handler asked for a value that the change does not carry (a KeyError too)
├── SessionMisuse           a handler tried to end or replace the worker's transaction
├── HandlerExit             a handler ended by something that is no Exception, or cancelled itself
├── HandlerStuck            a handler does not end, not even when it is cancelled
├── RedisLost               a handler's command to Redis had no answer
├── TokenRefused            a token that is not to be trusted
├── KeysUnavailable         the public keys that would tell are not to be had
├── WorkerDied              a call has ended its worker's process, again and again
└── Verdict                 what a handler says about its change; not a failure of the worker
    ├── RetryLater          hold the change, call again after so many seconds
    └── GiveUp              never again: dead letter
"""

from collections.abc import Iterable


class TailraceError(Exception):
    """Base of all exceptions that this project raises on purpose."""


class ConfigurationError(TailraceError):
    """Settings or handlers with which starting makes no sense. Carries every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class HandlerProblem(TailraceError):  # noqa: N818 - a finding of the loader, reported beside others
    """One thing wrong in the declaration of one handler, in one line with its remedy."""


class FilterError(TailraceError, ValueError):
    """A filter that cannot be read, or that does not fit the table it is for."""


class MalformedChange(TailraceError, ValueError):  # noqa: N818 - named after what it is about, as the docs do
    """A payload that is no change: not JSON, or without a part every change has. Never carries row values."""


class NewerFormat(TailraceError):  # noqa: N818 - named after what it is about, as the docs do
    """Lanes, positions or changes as a newer version writes them: nothing is wrong with them, but wait."""


class Refused(TailraceError):  # noqa: N818 - says what happened
    """What a person asked for cannot be done. The text is one line, without row values, and says why."""


class Unknown(Refused):
    """There is no dead letter, handler, backfill or paused lane key of that name."""


class MissingValueError(TailraceError, KeyError):
    """A column is part of the row, but its value did not come and could not be read again.

    A KeyError too, so that code which treats a record as a mapping may catch what it knows.
    """

    def __init__(self, column: str, reason: str) -> None:
        self.column = column
        self.reason = reason
        super().__init__(f'the value of column "{column}" is missing: {reason}')

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; this message is a sentence.
        return str(self.args[0])


class SessionMisuse(TailraceError):  # noqa: N818 - says what the handler did
    """A handler tried to commit, roll back, close or begin on the session the worker lent to it."""


class HandlerExit(TailraceError):  # noqa: N818 - says what happened
    """A handler raised SystemExit or the like, or cancelled its own task."""


class HandlerStuck(TailraceError):  # noqa: N818 - says what happened
    """A handler that swallows its cancellation was left behind, and its session closed."""


class RedisLost(TailraceError):  # noqa: N818 - says what happened
    """Redis went away under a handler that uses it: nobody's fault, as when Postgres goes."""


class TokenRefused(TailraceError):  # noqa: N818 - says what became of the token
    """A token that is not to be trusted. Carries nothing of the token.

    Attributes:
        kind: one or two words for a program: `expired`, `signature`, `audience`, …
        reason: the rest of a sentence that begins with "The token is refused:".
    """

    def __init__(self, kind: str, reason: str) -> None:
        self.kind = kind
        self.reason = reason
        super().__init__(f"the token is refused: {reason}")


class KeysUnavailable(TailraceError):  # noqa: N818 - a state of the project, not a defect of the token
    """The project's public keys cannot be had, and without them nobody can tell whether a token is good."""


class WorkerDied(TailraceError):  # noqa: N818 - says what happened
    """A handler's call has ended the worker's process (a crash, out of memory) so often that it is held."""


class Verdict(TailraceError):  # noqa: N818 - a verdict is a statement, not an error
    """What a handler states about its change by raising it."""


class RetryLater(Verdict):
    """The change cannot be handled yet: hold its lane key and call again.

    Args:
        seconds: wait this long before the next attempt; None leaves it to the backoff.
        reason: shown to the operator; never put row values into it.
    """

    def __init__(self, seconds: float | None = None, reason: str = "") -> None:
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ValueError(f"RetryLater needs seconds from 0 on, or none at all, not {seconds!r}")
        self.seconds = seconds
        self.reason = reason
        super().__init__(reason or "retry later")


class GiveUp(Verdict):
    """The change can never be handled: it becomes a dead letter at once.

    Args:
        reason: shown to the operator; never put row values into it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
