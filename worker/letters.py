"""What a hook for dead letters is given. Pure; worker/draining/alerting.py finds and tells them."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class DeadLetter:
    """A change, or the key of a derive handler, that was given up."""

    id: int
    """As `python -m worker dead-letters` names it."""
    handler: str
    schema: str | None
    table: str | None
    type: str | None
    """INSERT, UPDATE, DELETE or TRUNCATE; None for a key."""
    key: tuple[Any, ...] | None
    """Values of the primary key, or of the derive handler's key; None where they cannot be told."""
    position: str
    attempts: int
    error_class: str
    error: str
    """May have row values in it, as the database or the handler put them there."""
    hint: str | None
    """What to do about errors of this class."""
    first_failed_at: datetime
    last_failed_at: datetime


Hook = Callable[..., Coroutine[Any, Any, None]]
"""`async def hook(letter)` or `(letter, context)`."""
