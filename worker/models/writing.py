"""Models as text, by sqlacodegen, in the form that type checkers agree on.

It is told what there is (see `reflection`), and opens no connection of its own. sqlacodegen is an extra of
the package: what is written does not need it.
"""

import re
from typing import Any

from sqlacodegen.generators import DeclarativeGenerator
from sqlalchemy import Column, Connection, MetaData, Table
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlalchemy.dialects.postgresql.ranges import AbstractMultiRange, AbstractRange
from sqlalchemy.types import ARRAY

_HEAD = '''"""The database's tables, as {command} found them.

Change the database and write this file anew, rather than changing it by hand.
"""

# ruff: noqa
'''
_ELEMENTS = {
    "int4": "int",
    "int8": "int",
    "num": "decimal.Decimal",
    "date": "datetime.date",
    "ts": "datetime.datetime",
    "tstz": "datetime.datetime",
}
# Classes have names in the singular, and a shared primary key makes no base class: a profile is no user.
_OPTIONS = ("use_inflect", "nojoined")


def write(connection: Connection, metadata: MetaData, command: str) -> str:
    """Give the text of a module of models.

    Args:
        connection: to the database from which they were read; only its dialect is asked.
        metadata: from `reflect`.
        command: how to write the file anew, for the reader.
    """
    return (
        _HEAD.format(command=f"`{command}`")
        + "\n"
        + str(_Generator(metadata, connection, _OPTIONS).generate())
    )


class _Generator(DeclarativeGenerator):  # type: ignore[misc] # the extra may not be installed where types are checked
    """sqlacodegen's, with types where it says `object`, and one import for one name."""

    def render_column_python_type(self, column: Column[Any]) -> str:
        written: str = super().render_column_python_type(column)
        bare = column.type.item_type if isinstance(column.type, ARRAY) else column.type
        words = written.replace("[", " [ ").replace("]", " ] ").split()
        if not {"object", "Any"} & set(words):
            return written
        better = self._better(bare)
        return "".join(better if word in ("object", "Any") else word for word in words)

    def _better(self, type_: Any) -> str:  # noqa: ANN401 - any SQL type
        if isinstance(type_, AbstractRange | AbstractMultiRange):
            name = type(type_).__name__.lower().removesuffix("range").removesuffix("multi")
            element = _ELEMENTS[name]
            if "." in element:
                self.add_module_import(element.partition(".")[0])
            if isinstance(type_, AbstractMultiRange):
                self.add_literal_import("collections.abc", "Sequence")
            self.add_literal_import("sqlalchemy.dialects.postgresql", "Range")
            one = f"Range[{element}]"
            return f"Sequence[{one}]" if isinstance(type_, AbstractMultiRange) else one
        if isinstance(type_, TSVECTOR):
            return "str"
        self.add_literal_import("typing", "Any")
        return "Any"

    def render_models(self, models: list[Any]) -> str:
        written: str = super().render_models(models)
        # A relationship may name a table further down, whose type mypy does not yet know.
        return re.sub(r"^(t_\w+) = Table\(", r"\1: Table = Table(", written, flags=re.MULTILINE)

    def render_table(self, table: Table) -> str:
        written: str = super().render_table(table)
        if not table.info.get("referred"):
            return written
        return f"{written}  # only what the models here refer to"

    def group_imports(self) -> list[list[str]]:
        # Both have one, and a second import of the name hides the first from no reader but the interpreter.
        if "ARRAY" in self.imports.get("sqlalchemy.dialects.postgresql", ()):
            self.remove_literal_import("sqlalchemy", "ARRAY")
        groups: list[list[str]] = super().group_imports()
        return groups
