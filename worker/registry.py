"""What a module of handlers declares: which coroutine wants which changes of which tables, and how.

Pure: no import of user code (worker/loader.py), no database, no running of handlers. Decorators never
raise for a wrong declaration; they note it, so that the loader can report all problems at once.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql import Select

from worker.change import Change, Context
from worker.declarations import (
    ROW_TYPES,
    Declaration,
    Handler,
    Subscription,
    declare,
    hook_problems,
    merge,
    parse_table,
)
from worker.errors import ConfigurationError, HandlerProblem
from worker.forgetting import forgetting
from worker.letters import DeadLetter, Hook
from worker.signatures import Kind

__all__ = ["Handler", "Handlers", "Subscription"]

ChangeType = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]


class HandlerOptions(TypedDict, total=False):
    """Options of every handler."""

    name: str
    filter: str
    max_attempts: int
    backoff: float
    backoff_max: float
    after: Literal["continue", "halt"]
    timeout: float
    role: str
    claims: Mapping[str, Any]


class DeriveOptions(HandlerOptions, total=False):
    """Options of derive handlers."""

    by: str | Iterable[str]
    columns: Iterable[str]
    batch: int
    all_keys: Select[Any] | Callable[[], Select[Any]]


class RowOptions(HandlerOptions, total=False):
    """Options of `insert` and `delete`."""

    lane_key: str | Iterable[str]


class UpdateOptions(RowOptions, total=False):
    """Options of `update`."""

    columns: Iterable[str]


class ChangeOptions(UpdateOptions, total=False):
    """Options of `change`."""

    types: Iterable[ChangeType]


_Result = Coroutine[Any, Any, None]
_Derive = TypeVar(
    "_Derive",
    bound=Callable[[list[Any], AsyncSession], _Result]
    | Callable[[list[Any], AsyncSession, Context], _Result],
)
_One = TypeVar(
    "_One",
    bound=Callable[[Change, AsyncSession], _Result] | Callable[[Change, AsyncSession, Context], _Result],
)
_Many = TypeVar(
    "_Many",
    bound=Callable[[list[Change], AsyncSession], _Result]
    | Callable[[list[Change], AsyncSession, Context], _Result],
)
_Hook = TypeVar("_Hook", bound=Callable[[DeadLetter], _Result] | Callable[[DeadLetter, Context], _Result])
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Handlers:
    """The handlers of one module: `on = Handlers()`.

    Each decorator returns the function unchanged, so tests call it as it is. Decorators stacked on one
    function make one handler with several subscriptions. Tables are written `schema.table`, or `table`
    for schema public, exactly as the catalogue spells them, a name with a dot in it in double quotes.
    """

    def __init__(self) -> None:
        self._declared: list[Declaration] = []
        self._hooks: list[Hook] = []

    def derive(self, table: str, **options: Unpack[DeriveOptions]) -> Callable[[_Derive], _Derive]:
        """Call the function with the distinct keys whose rows changed, to recompute from current state.

        Args:
            table: whose changes to follow.
            **options: `by`, the column or columns whose values are the keys (default: the primary key;
                the function gets a list of values, or of tuples for several columns); `columns`, to
                ignore updates that change none of these nor the keys; `filter`, met if the old or the
                new row matches; `all_keys`, a SELECT of every key it keeps, for TRUNCATE and backfills;
                `batch`; and the options of every handler.
        """
        return self._decorator("derive", "derive", table, ROW_TYPES, options)

    @overload
    def insert(
        self, table: str, *, batch: int, **options: Unpack[RowOptions]
    ) -> Callable[[_Many], _Many]: ...
    @overload
    def insert(self, table: str, **options: Unpack[RowOptions]) -> Callable[[_One], _One]: ...
    def insert(self, table: str, **options: Any) -> Callable[[_Function], _Function]:
        """Call the function with each inserted row; with `batch=`, with lists of them."""
        return self._decorator("insert", "change", table, frozenset({"INSERT"}), options)

    @overload
    def update(
        self, table: str, *, batch: int, **options: Unpack[UpdateOptions]
    ) -> Callable[[_Many], _Many]: ...
    @overload
    def update(self, table: str, **options: Unpack[UpdateOptions]) -> Callable[[_One], _One]: ...
    def update(self, table: str, **options: Any) -> Callable[[_Function], _Function]:
        """Call the function with each updated row; `columns=`: only if one of these changed."""
        return self._decorator("update", "change", table, frozenset({"UPDATE"}), options)

    @overload
    def delete(
        self, table: str, *, batch: int, **options: Unpack[RowOptions]
    ) -> Callable[[_Many], _Many]: ...
    @overload
    def delete(self, table: str, **options: Unpack[RowOptions]) -> Callable[[_One], _One]: ...
    def delete(self, table: str, **options: Any) -> Callable[[_Function], _Function]:
        """Call the function with each deleted row; `filter=` judges the row as it was."""
        return self._decorator("delete", "change", table, frozenset({"DELETE"}), options)

    @overload
    def change(
        self, table: str, *, batch: int, **options: Unpack[ChangeOptions]
    ) -> Callable[[_Many], _Many]: ...
    @overload
    def change(self, table: str, **options: Unpack[ChangeOptions]) -> Callable[[_One], _One]: ...
    def change(self, table: str, **options: Any) -> Callable[[_Function], _Function]:
        """Call the function with each change; `types=`: only of these types, TRUNCATE only if named here."""
        return self._decorator("change", "change", table, ROW_TYPES, options)

    def caches(self, table: str) -> None:
        """Have a table followed for `context.cache`: what was computed from its rows ends when they change.

        Once for each table, in whichever module. It shows as a handler named `cache:schema.table`.
        """
        try:
            function, name = forgetting(parse_table(table))
        except HandlerProblem:
            # What is wrong with it is told with all else.
            function, name = forgetting(("?", str(table)))
        self._declared.append(declare(function, "derive", "derive", table, ROW_TYPES, {"name": name}))

    def dead_letter(self, hook: _Hook) -> _Hook:
        """Call the function with each dead letter of the handlers of this module, at least once.

        For alerting: it is given a `DeadLetter`, and a `Context` where it has a second parameter. It has no
        session, and what it raises is logged and tried again later.
        """
        self._hooks.append(hook)
        return hook

    def _decorator(
        self, decorator: str, kind: Kind, table: object, types: frozenset[str], options: Mapping[str, Any]
    ) -> Callable[[_Function], _Function]:
        def note(function: _Function) -> _Function:
            self._declared.append(declare(function, decorator, kind, table, types, options))
            return function

        return note

    def collect(self) -> tuple[list[Handler], list[str]]:
        """Return the handlers declared so far, and a line for each problem; what has one is left out."""
        stacks: dict[int, list[Declaration]] = {}
        for declaration in self._declared:
            # Decorators run from the lowest up; people read them from the top.
            stacks.setdefault(id(declaration.function), []).insert(0, declaration)
        handlers: list[Handler] = []
        problems: list[str] = []
        for stack in stacks.values():
            handler, found = merge(stack)
            handlers += [replace(handler, hooks=tuple(self._hooks))] if handler else []
            problems += found
        for hook in self._hooks:
            problems += hook_problems(hook)
        return handlers, problems

    def handlers(self) -> tuple[Handler, ...]:
        """Return the handlers declared so far.

        Raises:
            ConfigurationError: something is wrong with one of them; every problem is in it.
        """
        handlers, problems = self.collect()
        if problems:
            raise ConfigurationError(problems)
        return tuple(handlers)
