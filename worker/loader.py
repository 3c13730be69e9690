"""Finds the handlers in the modules of HANDLERS, and judges them against the database's catalogue.

Importing user code happens here alone. Nothing is read from the database here: the catalogue is given.
Every problem is one line that says what is wrong and what to do; all of them are reported together.
"""

import difflib
import importlib
import pkgutil
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper

from worker.catalogue import Catalogue, Table
from worker.declarations import Handler, Subscription
from worker.errors import ConfigurationError, FilterError
from worker.registry import Handlers
from worker.values import is_cut

Delivery = Literal["plain", "proven"]


def load(modules: Sequence[str]) -> tuple[Handler, ...]:
    """Import the modules (of a package: all its modules) and return the handlers they declare.

    Raises:
        ConfigurationError: with every problem of every module.
    """
    problems: list[str] = []
    seen: dict[str, ModuleType] = {}
    for name in modules:
        seen.update(_imported(name, problems))
    registries: dict[int, tuple[str, Handlers]] = {}
    for module in seen.values():
        for value in vars(module).values():
            if isinstance(value, Handlers):
                # `from orders import on` shows the same registry in two modules: it counts once.
                registries.setdefault(id(value), (module.__name__, value))
    handlers: dict[str, tuple[str, Handler]] = {}
    declared = False
    for home, registry in registries.values():
        found, wrong = registry.collect()
        declared = declared or bool(found or wrong)
        problems += wrong
        for handler in found:
            first = handlers.setdefault(handler.name, (home, handler))
            if first[1] is not handler:
                problems.append(_duplicate(first, (home, handler)))
    if not declared and not problems:
        problems.append(
            f"HANDLERS={','.join(modules)} has no handler: declare one with on = Handlers() and"
            ' @on.derive("public.orders", by="customer_id")'
        )
    if problems:
        raise ConfigurationError(dict.fromkeys(problems))
    return tuple(handler for _, handler in handlers.values())


def _duplicate(first: tuple[str, Handler], second: tuple[str, Handler]) -> str:
    name = second[1].name
    if first[1].function is second[1].function:
        return f"{name}: registered in {first[0]} and again in {second[0]}; one function is one handler"
    return f'{name}: two handlers have this name, in {first[0]} and {second[0]}; give one its own name="…"'


def _imported(name: str, problems: list[str]) -> Iterator[tuple[str, ModuleType]]:
    """Import a module, or a package with all its modules."""
    module = _import(name, problems, "HANDLERS")
    if module is None:
        return
    yield name, module
    path = getattr(module, "__path__", None)
    if path is None:
        if not any(isinstance(value, Handlers) for value in vars(module).values()):
            problems.append(f"{name}: has no Handlers() object; write: on = Handlers()")
        return
    yield from _submodules(name, path, problems)


def _submodules(package: str, path: Iterable[str], problems: list[str]) -> Iterator[tuple[str, ModuleType]]:
    # A directory without __init__.py, such as Alembic's, is no part of the package.
    for found in sorted(pkgutil.iter_modules(path), key=lambda found: found.name):
        if found.name == "__main__":
            continue
        name = f"{package}.{found.name}"
        module = _import(name, problems, package)
        if module is not None:
            yield name, module
            yield from _submodules(name, getattr(module, "__path__", ()), problems)


def _import(name: str, problems: list[str], named_by: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            problems.append(f"{name}: there is no module of this name (from {named_by}, on sys.path)")
        else:
            problems.append(f"{name}: cannot be imported, it needs {error.name}{_where(error)}: {error}")
    except SyntaxError as error:
        problems.append(f"{name}: cannot be imported: {error.msg} ({error.filename}, line {error.lineno})")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may do anything while it is imported
        said = str(error).splitlines()
        problems.append(
            f"{name}: cannot be imported: {type(error).__name__}: {said[0] if said else ''}{_where(error)}"
        )
    return None


def _where(error: BaseException) -> str:
    """Tell the innermost place in a file, leaving out the import machinery."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    inner = [frame for frame in frames if frame.filename != __file__]
    return f" ({inner[-1].filename}, line {inner[-1].lineno})" if inner else ""


def validate(
    handlers: Iterable[Handler],
    catalogue: Catalogue,
    delivery: Delivery,
    *,
    publication: str = "supabase_realtime",
) -> list[str]:
    """Judge handlers against the tables they name. Returns one line for each problem, none if all is well.

    Args:
        handlers: as `load` returned them.
        catalogue: of the database the changes come from.
        delivery: plain delivery carries less than proven: row-level security cuts DELETE to the key,
            and char(n) and bit(n) come as one character.
        publication: its name, for the remedies.
    """
    problems: list[str] = []
    handlers = list(handlers)
    if not catalogue.publication_exists:
        tables = sorted({_sql_name(found.schema, found.table) for h in handlers for found in h.subscriptions})
        problems.append(
            f"publication {publication} does not exist; run:"
            f" create publication {_quoted(publication)} for table {', '.join(tables)};"
        )
    for handler in handlers:
        for subscription in handler.subscriptions:
            table = catalogue.tables.get((subscription.schema, subscription.table))
            if table is None:
                hint = _closest_table(subscription.table, catalogue.tables)
                problems.append(f"{handler.name}: there is no table {subscription.qualified}{hint}")
                continue
            if catalogue.publication_exists and not table.published:
                name = _sql_name(table.schema, table.name)
                problems.append(
                    f"{handler.name}: {subscription.qualified} is not in publication {publication}; run:"
                    f" alter publication {_quoted(publication)} add table {name};"
                )
            found = _Judge(handler, subscription, table, delivery).problems()
            problems += [f"{handler.name}: {problem}" for problem in found]
        problems += [f"{handler.name}: {problem}" for problem in _unlike_keys(handler, catalogue)]
        problems += [f"{handler.name}: {problem}" for problem in _unlike_model(handler, catalogue)]
    return list(dict.fromkeys(problems))


class _Judge:
    """One subscription beside its table."""

    def __init__(
        self, handler: Handler, subscription: Subscription, table: Table, delivery: Delivery
    ) -> None:
        self.kind = handler.kind
        self.subscription = subscription
        self.table = table
        self.delivery = delivery
        self._name = subscription.qualified
        self._sql = _sql_name(table.schema, table.name)
        self.key_option = "by=" if handler.kind == "derive" else "lane_key="
        self.filter_columns = subscription.filter.columns if subscription.filter else frozenset[str]()

    def problems(self) -> list[str]:
        if not self.table.primary_key:
            # Realtime answers each change of such a table with an error, and nothing can be repaired by key.
            return [
                f"{self._name} has no primary key; run: alter table {self._sql} add primary key (…);",
            ]
        unknown = self._unknown_columns()
        if unknown:
            return unknown
        problems = []
        if self.subscription.filter is not None:
            try:
                self.subscription.filter.validate(self.table)
            except FilterError as error:
                problems.append(f"filter= on {self._name}: {error}")
        problems += self._identity_problems()
        if self.delivery == "plain":
            problems += self._cut_values()
        return problems

    def _asked(self) -> Iterator[tuple[str, Iterable[str]]]:
        yield self.key_option, self.subscription.lane_key or ()
        yield "columns=", sorted(self.subscription.columns)
        yield "filter=", sorted(self.filter_columns)

    def _unknown_columns(self) -> list[str]:
        known = self.table.columns
        return [
            f"{option} names column {column}, which {self._name} does not have" + _closest(column, known)
            for option, columns in self._asked()
            for column in columns
            if column not in known
        ]

    def _old_values(self, change_type: str) -> dict[str, frozenset[str]]:
        """Return what must be in the old row of an UPDATE or DELETE, by the option that needs it."""
        lane_key = self.subscription.lane_key
        option = self.key_option if lane_key else "the order of each row's changes"
        needs = {option: frozenset(lane_key or self.table.primary_key)}
        needs["filter="] = self.filter_columns
        if change_type == "UPDATE":
            needs["columns="] = self.subscription.columns
        return needs

    def _identity_problems(self) -> list[str]:
        """Refuse options that need old values which no UPDATE or DELETE of the table carries."""
        types = sorted(self.subscription.types & {"UPDATE", "DELETE"}, reverse=True)
        carried = self.table.identity_columns
        missing: dict[str, set[str]] = {}
        for change_type in types:
            for option, columns in self._old_values(change_type).items():
                if columns - carried:
                    missing.setdefault(option, set()).update(columns - carried)
        problems = [
            f"{option} needs old values of {_listed(columns)}, which the replica identity of"
            f" {self._name} ({self.table.identity}) does not carry; run:"
            f" alter table {self._sql} replica identity full;"
            for option, columns in missing.items()
        ]
        if not problems and self.delivery == "plain" and self.table.row_security and "DELETE" in types:
            problems += self._row_security_problems()
        return problems

    def _row_security_problems(self) -> list[str]:
        key = frozenset(self.table.primary_key)
        return [
            f"{option} needs old values of {_listed(columns - key)}, but with row-level security on,"
            f" Realtime's DELETE of {self._name} carries the primary key alone; use proven delivery"
            f" (WORKER_DELIVERY=proven), or run: alter table {self._sql} disable row level security;"
            for option, columns in self._old_values("DELETE").items()
            if columns - key
        ]

    def _cut_values(self) -> list[str]:
        """Refuse to route by what Realtime cuts to one character: two keys would look alike."""
        problems = []
        asked = {option: frozenset(columns) for option, columns in self._asked()}
        if self.subscription.lane_key is None:
            asked["the primary key"] = frozenset(self.table.primary_key)
        for option, columns in asked.items():
            cut = {name for name in columns if is_cut(self.table.columns[name])}
            if cut:
                alters = ", ".join(f"alter column {_quoted(name)} type text" for name in sorted(cut))
                problems.append(
                    f"{option} uses {_listed(cut)} of {self._name}, and Realtime cuts char(n) and bit(n)"
                    f" to one character; use proven delivery (WORKER_DELIVERY=proven), or another type:"
                    f" alter table {self._sql} {alters};"
                )
        return problems


_ALIKE: Mapping[str, str] = {
    "int2": "int8",
    "int4": "int8",
    "varchar": "text",
    "bpchar": "text",
    "name": "text",
}
"""Types whose equal values have equal canonical text, under the name of one of them."""


def _unlike_keys(handler: Handler, catalogue: Catalogue) -> list[str]:
    """Refuse keys of different types: one key of a derive handler would be two, in two lanes at once."""
    if handler.kind != "derive":
        return []
    shapes: dict[tuple[str, ...], str] = {}
    for subscription in handler.subscriptions:
        table = catalogue.tables.get((subscription.schema, subscription.table))
        key = subscription.lane_key or (table.primary_key if table else ())
        if table and key and all(column in table.columns for column in key):
            types = tuple(table.columns[column].value_type for column in key)
            shapes.setdefault(
                tuple(_ALIKE.get(name, name) for name in types), f"{subscription.qualified} {types}"
            )
    if len(shapes) > 1:
        kinds = " and ".join(shapes.values()).replace("'", "").replace(",)", ")")
        return [f"its keys have different types: {kinds}; make the columns of one type, or two handlers"]
    return []


def _unlike_model(handler: Handler, catalogue: Catalogue) -> list[str]:
    """Refuse `Change[Order]` where the changes are of another table than the model's."""
    if handler.model is None:
        return []
    mapper: Mapper[Any] = inspect(handler.model)
    of = mapper.local_table
    mapped, name = {column.name for column in of.c}, getattr(of, "name", None)
    problems = []
    for one in handler.subscriptions:
        table = catalogue.tables.get((one.schema, one.table))
        # A partition has another name and the same columns; a table that was altered, its name still.
        absent = mapped - table.columns.keys() if table and one.table != name else None
        if absent:
            problems.append(
                f"annotates Change[{handler.model.__name__}], but {one.qualified} has no {_listed(absent)};"
                " annotate the model of that table, or plain Change"
            )
    return problems


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(sorted(columns))


def _closest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; it has {', '.join(names)}" if names else ""


def _closest_table(name: str, known: Collection[tuple[str, str]]) -> str:
    # Without their schema, whose name would make all tables look alike.
    for close in difflib.get_close_matches(name, {table for _, table in known}, 1):
        schema = min(schema for schema, table in known if table == close)
        return f"; did you mean {schema}.{close}?"
    return "; create it, or correct the name"


def _quoted(name: str) -> str:
    if name.isidentifier() and name.isascii() and name == name.lower():
        return name
    return '"' + name.replace('"', '""') + '"'


def _sql_name(schema: str, table: str) -> str:
    return f"{_quoted(schema)}.{_quoted(table)}"
