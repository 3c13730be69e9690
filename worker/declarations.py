"""What the decorators of worker/registry.py note: subscriptions and handlers, and what is wrong with them.

Pure. Whether tables and columns exist is not known here; worker/loader.py asks the catalogue.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from sqlalchemy.sql import Select

from worker.errors import FilterError, HandlerProblem
from worker.filters import Filter
from worker.letters import Hook
from worker.signatures import Kind, read_signature

_Read = TypeVar("_Read")

ROW_TYPES: frozenset[str] = frozenset({"INSERT", "UPDATE", "DELETE"})
"""What `change` and `derive` subscribe to; TRUNCATE reaches only change handlers that ask for it."""
ALL_TYPES: frozenset[str] = ROW_TYPES | {"TRUNCATE"}

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}")  # goes into Redis keys, metric labels and URL paths
_IDENTIFIER = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')


@dataclass(frozen=True)
class Subscription:
    """A handler's live interest in one table."""

    schema: str
    table: str
    types: frozenset[str]
    """Of INSERT, UPDATE, DELETE, TRUNCATE."""
    filter: Filter | None
    columns: frozenset[str]
    """An UPDATE counts only if one of these changed; empty: every UPDATE counts."""
    lane_key: tuple[str, ...] | None
    """Columns whose values make the lane key (derive: `by`); None: the primary key."""

    @property
    def qualified(self) -> str:
        """The table as people write it: schema.table."""
        return f"{self.schema}.{self.table}"


# eq=False: a handler is itself and nothing else, and may key a dict although its claims are a mapping.
@dataclass(frozen=True, eq=False, repr=False)
class Handler:
    """One user coroutine with all its subscriptions. Option None: the setting decides."""

    name: str
    """Stable identity: `module:function` unless `name=` was given."""
    kind: Kind
    function: Callable[..., Coroutine[Any, Any, None]]
    subscriptions: tuple[Subscription, ...]
    batch: int | None
    """Greatest number of changes (derive: keys) in one call."""
    max_attempts: int | None
    backoff: float | None
    """Seconds before the second attempt."""
    backoff_max: float | None
    """Seconds."""
    after: Literal["continue", "halt"] | None
    """What follows a dead letter: the next change of its key, or nothing until a person has decided."""
    timeout: float | None
    """Seconds one call may take."""
    role: str | None
    claims: Mapping[str, Any] | None
    all_keys: Callable[[], Select[Any]] | None
    wants_context: bool
    wants_list: bool
    """Derive handlers, and change handlers with `batch=`: the first argument is a list."""
    hooks: tuple[Hook, ...] = ()
    """Called with each dead letter."""
    model: type[Any] | None = None
    """The class that the function has annotated, as in `Change[Order]`."""

    def __repr__(self) -> str:
        # Short, and without the claims.
        return f"<{self.kind} handler {self.name}>"


@dataclass
class Declaration:
    """One decorator on one function, read."""

    function: Callable[..., Any]
    decorator: str
    kind: Kind
    subscription: Subscription | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the handler as a whole, by name; those of the subscription are in it."""
    problems: list[str] = field(default_factory=list)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _seconds(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    )


def _positive(value: object) -> bool:
    return _seconds(value) and value != 0


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


_CHECKS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "name": (
        lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None,
        "1 to 200 letters, digits or any of _ . : -",
    ),
    "batch": (_whole, "a whole number from 1 on"),
    "max_attempts": (_whole, "a whole number from 1 on"),
    "backoff": (_seconds, "a number of seconds from 0 on"),
    "backoff_max": (_seconds, "a number of seconds from 0 on"),
    "after": (lambda value: value in ("continue", "halt"), '"continue" or "halt"'),
    "timeout": (_positive, "a number of seconds above 0"),
    "role": (_text, "the name of a database role"),
    "claims": (lambda value: isinstance(value, Mapping), "a mapping: the claims of a JWT"),
    "all_keys": (
        lambda value: isinstance(value, Select) or callable(value),
        "a SELECT, or a function that makes one",
    ),
}
_SUBSCRIPTION_OPTIONS: Mapping[str, frozenset[str]] = {
    "derive": frozenset({"by", "filter", "columns"}),
    "insert": frozenset({"lane_key", "filter"}),
    "update": frozenset({"lane_key", "filter", "columns"}),
    "delete": frozenset({"lane_key", "filter"}),
    "change": frozenset({"lane_key", "filter", "columns", "types"}),
}


def parse_table(text: object) -> tuple[str, str]:
    """Split `schema.table`, or `table` for schema public; names as spelled, double quotes keep dots.

    Raises:
        HandlerProblem: this names no table.
    """
    if not isinstance(text, str):
        raise HandlerProblem('the first argument must name a table, as in @on.change("public.orders")')
    parts: list[str] = []
    rest = text
    while match := _IDENTIFIER.match(rest):
        quoted, plain = match.groups()
        parts.append(quoted.replace('""', '"') if quoted is not None else plain)
        rest = rest[match.end() :]
        if not rest.startswith("."):
            break
        rest = rest[1:] or "."
    if rest or not 1 <= len(parts) <= 2 or any(part != part.strip() for part in parts):  # noqa: PLR2004 - schema, table
        raise HandlerProblem(
            f'"{text}" names no table; write "schema.table", with double quotes around odd names'
        )
    return ("public", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def declare(
    function: Callable[..., Any],
    decorator: str,
    kind: Kind,
    table: object,
    types: frozenset[str],
    options: Mapping[str, Any],
) -> Declaration:
    """Read one decorator. Whatever is wrong is noted in the declaration, nothing is raised."""
    declaration = Declaration(function, decorator, kind)
    problems = declaration.problems
    own = _SUBSCRIPTION_OPTIONS[decorator]
    general = _CHECKS.keys() - (set() if kind == "derive" else {"all_keys"})
    for option, value in options.items():
        if option not in own | general:
            problems.append(f"unknown option {option}= of @on.{decorator}{_hint(option, own | general)}")
        elif option in general and value is not None:
            accepts, wanted = _CHECKS[option]
            if accepts(value):
                declaration.options[option] = value
            else:
                # Claims may hold personal data: never show them.
                given = type(value).__name__ if option == "claims" else repr(value)
                problems.append(f"{option}= must be {wanted}, not {given}")
    # One after the other, so that a wrong table does not hide a wrong filter.
    names = _noted(problems, parse_table, table)
    asked = _noted(problems, _types, options.get("types"))
    condition = _noted(problems, _filter, options.get("filter"))
    changed = _noted(problems, partial(_columns, "columns"), options.get("columns"))
    key = "by" if kind == "derive" else "lane_key"
    lane_key = _noted(problems, partial(_columns, key), options.get(key))
    if names is not None:
        columns = frozenset(changed or ())
        declaration.subscription = Subscription(*names, asked or types, condition, columns, lane_key)
    return declaration


def _noted(problems: list[str], read: Callable[[object], _Read | None], value: object) -> _Read | None:
    try:
        return read(value)
    except HandlerProblem as problem:
        problems.append(str(problem))
        return None


def _filter(value: object) -> Filter | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise HandlerProblem(f'filter= must be text such as "status=eq.paid", not {value!r}')
    try:
        return Filter.parse(value)
    except FilterError as error:
        raise HandlerProblem(f'filter "{value}": {error}') from error


def _types(value: object) -> frozenset[str] | None:
    if value is None:
        return None
    types = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not types or not all(isinstance(item, str) and item in ALL_TYPES for item in types):
        raise HandlerProblem(f"types= must name some of INSERT, UPDATE, DELETE, TRUNCATE, not {value!r}")
    return frozenset(str(item) for item in types)


def _columns(option: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not names or not all(isinstance(item, str) and item for item in names) or len(set(names)) < len(names):
        raise HandlerProblem(f"{option}= must name columns, each once, not {value!r}")
    return tuple(str(name) for name in names)


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), 1)
    return f"; did you mean {close[0]}=?" if close else f"; known: {', '.join(sorted(known))}"


def default_name(function: Callable[..., Any]) -> str:
    """Return `module:function`."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}:{name}"


def merge(declarations: Sequence[Declaration]) -> tuple[Handler | None, list[str]]:
    """Make one handler of the decorators of one function, or the lines that say why it cannot be one."""
    function, kind = declarations[0].function, declarations[0].kind
    problems = [problem for declaration in declarations for problem in declaration.problems]
    options: dict[str, Any] = {}
    for option in _CHECKS:
        given: list[Any] = []
        for declaration in declarations:
            value = declaration.options.get(option)
            if value is not None and value not in given:
                given.append(value)
        if len(given) > 1:
            problems.append(f"{option}= has different values on its decorators; one function is one handler")
        options[option] = given[0] if given else None
    name = options.pop("name") or default_name(function)
    subscriptions = tuple(found.subscription for found in declarations if found.subscription is not None)
    wants_list = kind == "derive" or options["batch"] is not None
    signature = read_signature(function, kind, wants_list=wants_list)
    problems += signature.problems
    problems += _stack_problems(declarations, subscriptions)
    problems += _option_problems(options)
    if problems:
        return None, [f"{name}: {problem}" for problem in dict.fromkeys(problems)]
    all_keys, claims = options["all_keys"], options["claims"]
    options["all_keys"] = (lambda: all_keys) if isinstance(all_keys, Select) else all_keys
    options["claims"] = None if claims is None else MappingProxyType(dict(claims))
    return Handler(
        name,
        kind,
        function,
        subscriptions,
        **options,
        wants_context=signature.wants_context,
        wants_list=wants_list,
        model=signature.model,
    ), []


def hook_problems(hook: Callable[..., Any]) -> list[str]:
    """Tell what is wrong with a function that is to be called with dead letters."""
    name = getattr(hook, "__name__", "hook")
    wanted = f"async def {name}(letter) or (letter, context)"
    if not inspect.iscoroutinefunction(hook):
        return [f"{default_name(hook)}: must be a coroutine function: {wanted}"]
    parameters = inspect.signature(hook).parameters.values()
    if not 1 <= len(parameters) <= 2 or any(one.kind is not one.POSITIONAL_OR_KEYWORD for one in parameters):  # noqa: PLR2004 - letter, context
        return [f"{default_name(hook)}: has a wrong signature, it must be: {wanted}"]
    return []


def _option_problems(options: Mapping[str, Any]) -> list[str]:
    problems = []
    if options["claims"] is not None and options["role"] is None:
        problems.append('claims= needs role=, the role to run as, for example role="authenticated"')
    backoff, backoff_max = options["backoff"], options["backoff_max"]
    if backoff is not None and backoff_max is not None and backoff > backoff_max:
        problems.append(f"backoff={backoff} is above backoff_max={backoff_max}")
    return problems


def _stack_problems(declarations: Sequence[Declaration], subscriptions: Sequence[Subscription]) -> list[str]:
    """Tell what does not fit together among the decorators of one function."""
    problems = []
    kind = declarations[0].kind
    if any(declaration.kind != kind for declaration in declarations):
        return ["@on.derive cannot be stacked with other decorators: one is given keys, the other changes"]
    if kind == "derive":
        if len({len(found.lane_key) for found in subscriptions if found.lane_key}) > 1:
            problems.append(
                "by= names a different number of columns on its decorators; the keys must be alike"
            )
        return problems
    if len({declaration.options.get("batch") is None for declaration in declarations}) > 1:
        problems.append(
            "batch= must be on all of its decorators or on none: it decides between a change and a list"
        )
    keys: dict[str, set[tuple[str, ...] | None]] = {}
    for found in subscriptions:
        keys.setdefault(found.qualified, set()).add(found.lane_key)
    problems += [
        f"lane_key= differs between its decorators for {table}; one handler has one order per table"
        for table, different in keys.items()
        if len(different) > 1
    ]
    return problems
