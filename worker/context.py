"""What a handler may use besides its changes and its session. Whoever calls it fills it in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from worker.naming import Named

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
        named: what the handler says of single items of its list.
    """

    redis: "Redis"
    log: "FilteringBoundLogger"
    idempotency_key: str | None
    make_supabase: Callable[[], "AsyncClient"]
    make_cache: Callable[[], "Cache"] = _no_cache
    named: Named[Any] | None = None

    @cached_property
    def supabase(self) -> "AsyncClient":
        """The Supabase client with the service key: storage, auth admin. No part of the transaction."""
        return self.make_supabase()

    @cached_property
    def cache(self) -> "Cache":
        """What is looked up again and again, computed once for all workers."""
        return self.make_cache()

    def fail(self, item: object, error: Exception) -> None:
        """Say that one change, or key, of the list has failed, and go on with the others.

        It is treated as if the error had been raised for it alone: held and retried, or a dead letter.
        `RetryLater` and `GiveUp` mean what they mean when they are raised. All else that the call writes is
        committed, so write nothing for what has failed. Later changes of its lane keys wait behind it: where
        the call may have written for one of them, it is undone and made again without them (see `is_held`).

        Args:
            item: a change of the list, or a key of a derive handler, as it was given.
            error: why.

        Raises:
            ValueError: the call was not given this item.
            TypeError: the error is no exception.
            LookupError: the call is over, or there is none.
        """
        self._named.fail(item, error)

    def is_held(self, item: object) -> bool:
        """Tell whether a change waits behind one that this call has failed; then write nothing for it.

        A handler that asks for each change before it writes for it is not called a second time.

        Raises:
            ValueError: the call was not given this item.
            LookupError: the call is over, or there is none.
        """
        return self._named.is_held(item)

    @property
    def _named(self) -> Named[Any]:
        if self.named is None:
            raise LookupError("there is no call of a handler here")
        return self.named
