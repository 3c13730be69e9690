"""What the handler of a list says of single items: which have failed, so that the others need not be undone.

An item that has failed holds back what comes after it with one of its lane keys. Whether the handler has
written for such an item cannot be seen. Only where it was told, before it wrote, that the item waits, nothing
need be undone.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar


class Judged(Protocol):
    """A failure, as far as it matters here."""

    @property
    def holds_back(self) -> bool:
        """Later changes of its keys wait."""
        ...


FailureT = TypeVar("FailureT", bound=Judged)


def _no_keys(_: int) -> Iterable[bytes]:
    return ()


class Named(Generic[FailureT]):
    """What is said of the items of one call, each known by its place in the list.

    Args:
        judge: says what the error of an item means; None where nobody is to blame. Without it, an item that
            has failed is the failure of the whole call.
        keys: lane keys of an item.
        by_identity: items are told apart by what they are, not by their values.
    """

    def __init__(
        self,
        judge: Callable[[int, Exception], FailureT | None] | None = None,
        keys: Callable[[int], Iterable[bytes]] = _no_keys,
        *,
        by_identity: bool = True,
    ) -> None:
        self._judge = judge
        self._keys = keys
        self._by_identity = by_identity
        self._items: Sequence[object] | None = None
        self._places: dict[Hashable, int] = {}
        self._held_from: dict[bytes, int] = {}
        """The first item that holds back a key."""
        self._left_out: set[int] = set()
        """Of which the handler was told that they wait, before it wrote for them."""
        self._whole: Exception | None = None
        self.failed: dict[int, FailureT] = {}

    # For the handler

    def fail(self, item: object, error: Exception) -> None:
        """Note a failure; of what waits anyway, and of what has failed already, none is noted."""
        place = self._place(item)
        if not isinstance(error, Exception):
            raise TypeError(f"context.fail() is told the exception of an item, not {type(error).__name__}")
        if place in self.failed or self._waits(place):
            return
        failure = None if self._judge is None else self._judge(place, error)
        if failure is None:
            self._whole = self._whole or error
            return
        self.failed[place] = failure
        if failure.holds_back:
            self._hold_from(place)

    def is_held(self, item: object) -> bool:
        """Tell whether an item waits behind one that has failed."""
        place = self._place(item)
        if not self._waits(place):
            return False
        self._left_out.add(place)
        return True

    # For whoever calls it

    def begin(self, items: Sequence[object]) -> None:
        """Say what the handler is called with."""
        self._items = items

    def end(self) -> None:
        """Take no more; the handler has returned.

        Raises:
            Exception: what it said of an item is the failure of the call.
        """
        self._items = None
        if self._whole is not None:
            raise self._whole

    def overrun(self, items: int) -> bool:
        """Tell whether the handler may have written for one of its so many items that waits."""
        if not self._held_from:
            return False
        return any(self._waits(place) and place not in self._left_out for place in range(items))

    def _waits(self, place: int) -> bool:
        if not self._held_from:
            return False
        keys = self._keys(place)
        if all(self._held_from.get(key, place) >= place for key in keys):
            return False
        self._hold_from(place)  # with all its keys
        return True

    def _hold_from(self, place: int) -> None:
        for key in self._keys(place):
            self._held_from[key] = min(place, self._held_from.get(key, place))

    def _place(self, item: object) -> int:
        if self._items is None:
            raise LookupError("the call is over: what is said of its changes now comes too late")
        if not self._places:
            self._places = {self._token(one): place for place, one in enumerate(self._items)}
        try:
            return self._places[self._token(item)]
        except (KeyError, TypeError):
            raise ValueError(
                "this call was not given that item: name a change of the list, or a key, as it was given"
            ) from None

    def _token(self, item: object) -> Hashable:
        return id(item) if self._by_identity or not isinstance(item, Hashable) else item
