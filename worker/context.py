"""What a handler may use besides its changes and its session. Whoever calls it fills it in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only names in annotations here, and slow to import: seconds at every start of every process.
    from redis.asyncio import Redis
    from structlog.typing import FilteringBoundLogger
    from supabase import AsyncClient

    from worker.cache import Cache


def _no_cache() -> "Cache":
    raise LookupError("there is no cache where this handler is called")


@dataclass(frozen=True)
class Context:
    """What a handler may use besides its changes and its session.

    Attributes:
        redis: the worker's Redis connection. Nothing kept there is durable.
        log: logger, bound to the handler, and to the position where the call is for one change.
        idempotency_key: the same for every attempt at this change; for calls outside the database.
            None for derive handlers and batches, whose calls are cut anew each time.
        make_supabase: makes the client when a handler first asks for it.
        make_cache: likewise.
    """

    redis: "Redis"
    log: "FilteringBoundLogger"
    idempotency_key: str | None
    make_supabase: Callable[[], "AsyncClient"]
    make_cache: Callable[[], "Cache"] = _no_cache

    @cached_property
    def supabase(self) -> "AsyncClient":
        """The Supabase client with the service key: storage, auth admin. No part of the transaction."""
        return self.make_supabase()

    @cached_property
    def cache(self) -> "Cache":
        """What is looked up again and again, computed once for all workers."""
        return self.make_cache()
