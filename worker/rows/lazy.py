"""The rows behind the changes of one call, as instances of the handler's models, loaded when first asked for.

They are as they are now, in the handler's session and under its role. What its row was when a change was
committed is in the change itself; nothing here is used for routing or repair.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import inspect, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, Mapper, RelationshipProperty, selectinload

from worker.change import Change
from worker.errors import SessionMisuse
from worker.instances import detached

_AT_ONCE: Final = 5000
"""Keys in one statement: Postgres takes 32,767 parameters, and a key may have several columns."""

Identity = tuple[Any, ...]


class RowsOfCall:
    """Loads for all changes of a call together: asking for the row of each costs one statement."""

    def __init__(self, session: AsyncSession, changes: Sequence[Change]) -> None:
        self._session = session
        self._changes = changes
        self._loaded: dict[tuple[type[Any], str | None, str], dict[Identity, Any]] = {}
        self._ended = False
        # A handler may ask from several tasks, and a session is not for two at once.
        self._lock = asyncio.Lock()

    def end(self) -> None:
        """Give nothing from now on: the session is not the handler's any more."""
        self._ended = True

    async def row(self, change: Change, model: type[Any]) -> Any | None:  # noqa: ANN401 - an instance of the model
        """Give the row as it is now; None where there is none any more.

        Raises:
            ValueError: the change is of another table than the model's, or has no row.
            MissingValueError: the change lacks a column of the model's primary key.
        """
        identity = _identity(change, model)
        async with self._lock:
            return (await self._rows(change, model, None)).get(identity)

    async def related(self, change: Change, attribute: InstrumentedAttribute[Any]) -> Any | None:  # noqa: ANN401 - what the attribute holds
        """Give the rows that belong to the change's row; None where that is not there any more.

        Raises:
            ValueError: as `row`; or the attribute is no relationship.
        """
        if not isinstance(attribute.property, RelationshipProperty):
            raise ValueError(f"{attribute} is no relationship")  # noqa: TRY004 - its type is right, its kind is not
        model = attribute.parent.class_
        identity = _identity(change, model)
        async with self._lock:
            await self._rows(change, model, None)
            owner = (await self._rows(change, model, attribute)).get(identity)
        return None if owner is None else getattr(owner, attribute.key)

    async def _rows(
        self, change: Change, model: type[Any], attribute: InstrumentedAttribute[Any] | None
    ) -> dict[Identity, Any]:
        if self._ended:
            raise SessionMisuse("rows of a change can be loaded during the handler's call only")
        key = (model, None if attribute is None else attribute.key, f"{change.schema}.{change.table}")
        known = self._loaded.get(key)
        if known is None:
            same = [one for one in self._changes if (one.schema, one.table) == (change.schema, change.table)]
            # Changes that cannot be looked up fail when they are asked for, not for the others.
            wanted = dict.fromkeys(
                found for one in same if (found := _known_identity(one, model)) is not None
            )
            known = self._loaded[key] = await self._load(model, list(wanted), attribute)
        return known

    async def _load(
        self, model: type[Any], identities: Sequence[Identity], attribute: InstrumentedAttribute[Any] | None
    ) -> dict[Identity, Any]:
        mapper: Mapper[Any] = inspect(model)
        found: dict[Identity, Any] = {}
        for start in range(0, len(identities), _AT_ONCE):
            portion = identities[start : start + _AT_ONCE]
            # An earlier call in this transaction may have left the instance behind, older than the row. What
            # belongs to it is loaded later, and must not undo what was loaded for this call.
            query = select(model).execution_options(populate_existing=attribute is None)
            if len(mapper.primary_key) == 1:
                query = query.where(mapper.primary_key[0].in_([one for (one,) in portion]))
            else:
                query = query.where(tuple_(*mapper.primary_key).in_(portion))
            if attribute is not None:
                query = query.options(selectinload(attribute))
            for instance in await self._session.scalars(query):
                found[tuple(mapper.primary_key_from_instance(instance))] = instance
        return found


def _identity(change: Change, model: type[Any]) -> Identity:
    row = change.old_record if change.record is None else change.record
    name = f"{change.schema}.{change.table}"
    if row is None:
        raise ValueError(f"a {change.type} of {name} has no row")
    mapper: Mapper[Any] = inspect(model)
    # By its columns and not by its name: a partition's changes come under the partition's own.
    there = row.keys() | row.missing.keys()
    if change.record is not None and not {column.name for column in mapper.local_table.c} <= there:
        raise ValueError(f"a change of {name} has no row of {model.__name__}: it lacks columns of the model")
    return tuple(mapper.primary_key_from_instance(detached(model, row)))


def _known_identity(change: Change, model: type[Any]) -> Identity | None:
    try:
        return _identity(change, model)
    except (ValueError, KeyError):
        return None
