"""What the wanted tables and views of a database look like.

It reads the catalogue and no row. How that becomes Python is decided in `writing`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Enum, Inspector, MetaData, String, Table, inspect, text
from sqlalchemy.dialects.postgresql import DOMAIN
from sqlalchemy.types import ARRAY, TypeEngine

from worker.errors import ConfigurationError

# Partitions are rows of their parent; what an extension has made is its own business.
_LEFT_OUT = text(
    "select c.relname from pg_catalog.pg_class c where c.relnamespace ="
    " (select n.oid from pg_catalog.pg_namespace n where n.nspname = :schema)"
    " and (c.relispartition or exists (select from pg_catalog.pg_depend d where d.objid = c.oid"
    " and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype = 'e'))"
)


@dataclass(frozen=True)
class Wanted:
    """Which tables and views.

    Attributes:
        schemas: whose tables are wanted.
        tables: names, with their schema where it is not the first one; empty: all tables of the schemas.
    """

    schemas: tuple[str, ...] = ("public",)
    tables: tuple[str, ...] = ()

    def names(self) -> dict[str, set[str]]:
        """Give the names of `tables` by schema."""
        found: dict[str, set[str]] = {}
        for name in self.tables:
            schema, dot, table = name.rpartition(".")
            found.setdefault(schema if dot else self.schemas[0], set()).add(table)
        return found


def reflect(connection: Connection, wanted: Wanted) -> MetaData:
    """Read the wanted tables; of other tables to which they refer, no more than the columns referred to.

    Raises:
        ConfigurationError: a schema or table does not exist.
    """
    # With nothing in the path every name comes with its schema, however the server or the role is set up.
    connection.execute(text("set local search_path to ''"))
    inspector = inspect(connection)
    chosen = wanted.names() if wanted.tables else dict.fromkeys(wanted.schemas)
    _check(inspector, chosen)
    metadata = MetaData()
    for schema, names in chosen.items():
        left_out = set() if names else set(connection.scalars(_LEFT_OUT, {"schema": schema}))

        def asked(name: str, _: MetaData, names: Any = names, left_out: Any = left_out) -> bool:  # noqa: ANN401 - bound early
            return name not in left_out and (names is None or name in names)

        metadata.reflect(connection, schema, views=True, only=asked, resolve_fks=False)
    _refer(metadata, inspector)
    for table in metadata.tables.values():
        for column in table.columns:
            column.type = _plain(column.type)
    _check_enums(metadata)
    return metadata


def _check(inspector: Inspector, chosen: dict[str, Any]) -> None:
    schemas = set(inspector.get_schema_names())
    problems = [f"there is no schema {schema}" for schema in chosen if schema not in schemas]
    for schema, names in chosen.items():
        if names is not None and schema in schemas:
            there = {
                *inspector.get_table_names(schema),
                *inspector.get_view_names(schema),
                *inspector.get_materialized_view_names(schema),
            }
            problems += [f"there is no table or view {schema}.{name}" for name in sorted(names - there)]
    if problems:
        raise ConfigurationError(problems)


def _refer(metadata: MetaData, inspector: Inspector) -> None:
    """Add the tables that are referred to and not wanted: a foreign key needs something to point at."""
    columns: dict[tuple[str | None, str], set[str]] = {}
    for table in metadata.tables.values():
        for constraint in table.foreign_key_constraints:
            for key in constraint.elements:
                schema, name, column = _target(key.target_fullname)
                if f"{schema}.{name}" not in metadata.tables:
                    columns.setdefault((schema, name), set()).add(column)
    for (schema, name), names in sorted(columns.items(), key=str):
        # No primary key and nothing else: nobody should take it for the whole table.
        Table(name, metadata, schema=schema, info={"referred": True})
        table = metadata.tables[f"{schema}.{name}"]
        for described in inspector.get_columns(name, schema):
            if described["name"] in names:
                table.append_column(_column(described["name"], described["type"]))


def _target(full: str) -> tuple[str | None, str, str]:
    schema_and_table, _, column = full.rpartition(".")
    schema, _, table = schema_and_table.rpartition(".")
    return schema or None, table, column


def _column(name: str, type_: TypeEngine[Any]) -> Any:  # noqa: ANN401 - a Column of that type
    from sqlalchemy import Column  # noqa: PLC0415 - its stub hides the constructor's overloads from mypy here

    return Column(name, type_)


def _plain(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Give what a value of the type is: of a domain its base type, of a text one of no certain collation."""
    if isinstance(type_, DOMAIN):
        return _plain(type_.data_type)
    if isinstance(type_, ARRAY):
        type_.item_type = _plain(type_.item_type)
    elif isinstance(type_, String) and type_.collation == "default":
        type_.collation = None
    return type_


def _check_enums(metadata: MetaData) -> None:
    """Refuse what could only be written wrongly: one name for two types."""
    by_name: dict[str, set[str]] = {}
    for enum in _enums(metadata.tables.values()):
        by_name.setdefault(str(enum.name), set()).add(f"{enum.schema}.{enum.name}")
    problems = [
        f"{' and '.join(sorted(types))} are two enums of one name: give each schema a file of its own"
        for types in by_name.values()
        if len(types) > 1
    ]
    if problems:
        raise ConfigurationError(problems)


def _enums(tables: Collection[Table]) -> Sequence[Enum]:
    types = [column.type for table in tables for column in table.columns]
    inner = [type_.item_type if isinstance(type_, ARRAY) else type_ for type_ in types]
    return [type_ for type_ in inner if isinstance(type_, Enum)]
