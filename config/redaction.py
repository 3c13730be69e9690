"""What must not stand in a log: secrets, and the row values that other people's error texts carry.

Pure. `Redaction` knows the configured secrets by value; the rest goes by shape (JWTs, keys, passwords in
URLs) and by the name of the key. It is a net under code that should not have logged them, not a licence to.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

HIDDEN = "[redacted]"

_DEEPEST = 8
_SHORTEST = 4  # a shorter secret cannot be told from ordinary text; the shapes below still catch it in a URL
_UNBOUNDED = 12  # from this length on a secret is hidden even inside a longer word

_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|apikey|authorization|cookie|credentials?|jwt|passwd|password|secret|service_(role_)?key"
    r"|sslpassword|token)$",
    re.IGNORECASE,
)
# Names under which code is tempted to log rows. A number is a count of them, and may stay.
_ROW_NAME = re.compile(r"^((old_)?records?|params|parameters|payload|rows?|values?)$", re.IGNORECASE)
_SHAPES = (
    (re.compile(r"eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*"), HIDDEN),  # JWT
    (re.compile(r"\bsb_secret_[\w-]+"), HIDDEN),
    (re.compile(r"(?<=://)([^\s:/?#@\[\]]*):[^\s/]*@"), rf"\1:{HIDDEN}@"),  # the password of a URL
    (re.compile(r"(?i)\b(apikey|password|passwd|token|secret)=[^\s&;,'\"]+"), rf"\1={HIDDEN}"),
    (re.compile(r"(?i)\b(bearer) [\w.~+/=-]{16,}"), rf"\1 {HIDDEN}"),
)
# Postgres's details and SQLAlchemy's parameters quote the row; the first line of an error says enough.
_ROW_VALUES = (
    (re.compile(r"^(\s*(?:DETAIL|CONTEXT): ).*$", re.MULTILINE), rf"\1{HIDDEN}"),
    (re.compile(r"\[parameters: .*?\](?=\s*(?:\n|$|\(Background))", re.DOTALL), f"[parameters: {HIDDEN}]"),
    (re.compile(r'(invalid input (?:syntax|value) for [\w "]+?: )".*"'), rf"\1{HIDDEN}"),
)


class Redaction:
    """Hides secrets in anything that is about to be logged."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({text for text in secrets if len(text) >= _SHORTEST}, key=len, reverse=True)
        patterns = [
            re.escape(text) if len(text) >= _UNBOUNDED else rf"(?<!\w){re.escape(text)}(?!\w)"
            for text in known
        ]
        self._known = re.compile("|".join(patterns)) if patterns else None

    def text(self, text: str) -> str:
        """Return the text without secrets and without quoted rows."""
        # Shapes first: hiding a known word inside a URL would keep the URL's pattern from matching.
        for pattern, replacement in (*_SHAPES, *_ROW_VALUES):
            text = pattern.sub(replacement, text)
        return text if self._known is None else self._known.sub(HIDDEN, text)

    def value(self, value: object, depth: int = 0) -> object:  # noqa: PLR0911 - one return for each kind of value
        """Return a value fit for the log: containers gone through, what is unknown as its redacted text."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes | bytearray):
            return f"<{len(value)} bytes>"
        if isinstance(value, str) or hasattr(value, "_fields"):  # a named tuple has a text: a position's
            return self.text(str(value))
        if isinstance(value, Mapping | Sequence | set | frozenset) and depth >= _DEEPEST:
            return "…"
        if isinstance(value, Mapping):
            return {str(name): self.named(str(name), held, depth + 1) for name, held in value.items()}
        if isinstance(value, Sequence | set | frozenset):
            return [self.value(held, depth + 1) for held in value]
        return self.text(str(value))

    def named(self, name: str, value: object, depth: int = 0) -> object:
        """Return a value by the name it is logged under: a secret's or a row's name hides what it holds."""
        if value is None or isinstance(value, bool):
            return value
        if _SECRET_NAME.search(name):
            return HIDDEN
        if _ROW_NAME.match(name) and not isinstance(value, int | float):
            return HIDDEN
        return self.value(value, depth)
