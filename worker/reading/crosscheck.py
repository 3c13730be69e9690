"""What Realtime left out, and what it sent besides, counted against the log. Pure; no clock of its own.

Realtime's payloads carry no position. What both sides say of a change is its table, its type, the time of its
commit in milliseconds and, where both write it alike, its key: changes are counted by these, up on the one
side and down on the other, until both have shown a canary that was committed later. What is then not even was
left out by Realtime, or sent besides. All times are of the database's clock, so no other clock matters.

Counted is from a table's first subscription of a reading on; from then on also what commits while the
subscription is down. Memory is bounded: when too much is open, the older half is kept as a number alone, in
which one change left out and one sent besides cancel each other.
"""

import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from worker.change import Column, RawChange

MOST_OPEN: Final = 50_000
"""Changes that only one side has shown; some 15 MiB. Few are, as a rule."""
SLACK_MS: Final = 2_000
"""Both sides must be later than a change by so much: times of commits are not quite in their order."""
PATIENCE_MS: Final = 60_000
"""What Realtime has not sent so much log later, it left out; should it come after all, it is passed over."""

_ALIKE: Final = frozenset({"int2", "int4", "int8", "oid", "uuid", "text", "varchar"})
"""Types that both sides write alike, but for the quotes."""

_Table = tuple[str, str]
_Key = tuple[bytes, ...] | None
_Group = tuple[int, str, str, str]


@functools.lru_cache(maxsize=256)
def milliseconds(committed: str) -> int:
    """Give the time of a commit in milliseconds since 1970; Realtime cuts off what is below."""
    moment = datetime.fromisoformat(committed)
    return int(moment.replace(microsecond=0).timestamp()) * 1000 + moment.microsecond // 1000


class CrossCheck:
    """Counts what differs between Realtime and the log.

    Args:
        most_open: bound of what is remembered.
    """

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        self.missed = 0
        """What Realtime left out."""
        self.extra = 0
        """What Realtime sent twice, or without its being in the log."""
        self._most_open = most_open
        self.begin()

    def begin(self) -> None:
        """Begin anew, as a reading does: what is open is judged by nobody, the totals stay."""
        self._since: dict[_Table, int] = {}
        self._keys: dict[_Table, tuple[str, ...]] = {}
        self._groups: dict[_Group, dict[_Key, int]] = {}
        self._open = 0
        self._latest = 0
        self._passed: list[int | None] = [None, None]
        self._given_up = self._folded_to = -1
        self._folded = 0
        self._known: dict[_Table, tuple[Sequence[Column], tuple[str, ...] | None]] = {}

    @property
    def open(self) -> int:
        """How many changes are remembered one by one."""
        return self._open

    def expect(self, table: _Table, key: tuple[str, ...], canary_ms: int) -> None:
        """Count a table from now on: Realtime was subscribed to it before it showed a canary.

        Args:
            table: (schema, name).
            key: columns of its primary key.
            canary_ms: when the canary was committed.
        """
        if table not in self._since:
            # What either side has shown already is counted on neither.
            self._since[table] = max(canary_ms, self._latest)
            self._keys[table] = key

    def is_expected(self, table: _Table) -> bool:
        """Tell whether a table is counted."""
        return table in self._since

    def logged(self, change: RawChange) -> None:
        """Take in a change of the log, in its order."""
        self._count(change, 1)

    def heard(self, change: RawChange) -> None:
        """Take in a change that Realtime sent."""
        self._count(change, -1)

    def log_passed(self, canary_ms: int) -> None:
        """The log has shown a canary, and with it all that was committed before."""
        self._pass(0, canary_ms)

    def realtime_passed(self, canary_ms: int) -> None:
        """Realtime has shown a canary: what it has not sent by now of what was before, it left out."""
        self._pass(1, canary_ms)

    # Counting

    def _count(self, change: RawChange, by: int) -> None:
        if change.commit_timestamp is None or change.type == "TRUNCATE":
            return  # Realtime sends neither row nor time of what it withholds, and nothing of a TRUNCATE
        moment = milliseconds(change.commit_timestamp)
        self._latest = max(self._latest, moment)
        table = (change.schema, change.table)
        since = self._since.get(table)
        if since is None or moment <= since:
            return
        group = (moment, *table, change.type)
        balances = self._groups.get(group)
        if balances is None:
            if moment <= self._folded_to:
                self._folded += by
                return
            if by < 0 and moment <= self._given_up:
                return
            balances = self._groups[group] = {}
        key = self._key(table, change)
        before = balances.get(key, 0)
        balance = before + by
        self._open += abs(balance) - abs(before)
        if balance:
            balances[key] = balance
        else:
            del balances[key]
            if not balances:
                del self._groups[group]
        if self._open > self._most_open:
            self._fold()

    def _key(self, table: _Table, change: RawChange) -> _Key:
        """Give the values of the key; None where the two sides may write them differently, or not at all."""
        columns, names = self._known.get(table, (None, None))
        if columns is not change.columns:
            types = {column.name: column.type for column in change.columns}
            key = self._keys[table]
            names = key if key and all(types.get(name) in _ALIKE for name in key) else None
            self._known[table] = (change.columns, names)
        row = change.old_record if change.type == "DELETE" else change.record
        if names is None or row is None:
            return None
        try:
            return tuple([_text(row[name]) for name in names])
        except (KeyError, TypeError, msgspec.DecodeError):
            return None  # left out of a row that is too large

    def _fold(self) -> None:
        """Keep the older half as a number."""
        moments = sorted(self._groups)
        self._folded_to = max(self._folded_to, moments[len(moments) // 2][0])
        for group in moments:
            if group[0] <= self._folded_to:
                balances = self._groups.pop(group).values()
                self._folded += sum(balances)
                self._open -= sum(map(abs, balances))

    # Judging

    def _pass(self, side: int, canary_ms: int) -> None:
        self._latest = max(self._latest, canary_ms)
        self._passed[side] = canary_ms
        logged, heard = self._passed
        if logged is None:
            return
        both = logged - SLACK_MS if heard is None else min(logged, heard) - SLACK_MS
        bound = logged - PATIENCE_MS
        if heard is not None and both >= bound:
            bound = both
        else:
            self._given_up = max(self._given_up, bound)
        for group in [group for group in self._groups if group[0] <= bound]:
            self._judge(self._groups.pop(group))
        if 0 <= self._folded_to <= bound:
            self._add(self._folded)
            self._folded, self._folded_to = 0, -1

    def _judge(self, balances: dict[_Key, int]) -> None:
        self._open -= sum(map(abs, balances.values()))
        # Rows without a key are any of those that have one.
        keyless = balances.pop(None, 0)
        for balance in balances.values():
            if balance * keyless < 0:
                settled = min(abs(balance), abs(keyless))
                keyless += settled if keyless < 0 else -settled
                balance -= settled if balance > 0 else -settled  # noqa: PLW2901 - what is left of it
            self._add(balance)
        self._add(keyless)

    def _add(self, balance: int) -> None:
        if balance > 0:
            self.missed += balance
        else:
            self.extra -= balance


def _text(value: Any) -> bytes:  # noqa: ANN401 - JSON of Realtime or text of the log
    if isinstance(value, bytes):
        return value
    raw = bytes(value)
    return msgspec.json.decode(raw).encode() if raw[:1] == b'"' else raw
