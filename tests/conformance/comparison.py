"""Compares what was played with what was promised, and the differences with the table of deviations."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.conformance.deviations import Deviation
from tests.conformance.frames import Frame
from tests.conformance.player import Played
from tests.conformance.script import Closed, Receive, Refused, Script

_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference: where, what the script promises there and what came ("" for nothing)."""

    where: str
    promised: str
    came: str

    def __str__(self) -> str:
        start = _first_difference(self.promised, self.came)
        cut = slice(max(0, start - 80), start + _SHOWN)
        return f"{self.where}\n    promised {self.promised[cut] or '-'}\n    came     {self.came[cut] or '-'}"


def compare(script: Script, played: Played) -> list[Difference]:
    """List every difference; an empty list means that the run kept every promise and did nothing else.

    Order is compared among the frames of one connection and topic: between topics the real server has none,
    each channel being a process of its own.
    """
    promised = _groups((step.conn, step.frame) for step in script.steps if isinstance(step, Receive))
    came = _groups(played.frames)
    found = [Difference(f"statement {text[:60]}", "", problem) for text, problem in played.failures]
    for key in sorted(promised.keys() | came.keys()):
        found += _compare_group(" ".join(key), promised.get(key, []), came.get(key, []))
    found += _compare_commits(promised, came)
    found += _compare_handshakes(script, played)
    return found


def judge(script: Script, differences: Sequence[Difference], table: Iterable[Deviation]) -> list[str]:
    """Hold the differences against the table: what is left over on either side is a problem, in words."""
    rows = [row for row in table if row.scenario == script.name]
    used: set[Deviation] = set()
    problems = []
    for difference in differences:
        matching = [row for row in rows if _matches(row, difference)]
        used.update(matching)
        if not matching:
            problems.append(str(difference))
    problems += [
        f"the deviation {row.frame!r} does not occur any more: take it out of the table"
        for row in rows
        if row not in used
    ]
    return problems


def _matches(row: Deviation, difference: Difference) -> bool:
    pattern = re.escape(row.frame).replace(r"\*", ".*")
    return re.fullmatch(pattern, difference.where) is not None and row.instead in difference.came


def _groups(pairs: Iterable[tuple[str, Frame]]) -> dict[tuple[str, str], list[Frame]]:
    groups: dict[tuple[str, str], list[Frame]] = {}
    for conn, frame in pairs:
        groups.setdefault((conn, frame.topic), []).append(frame)
    return groups


def _compare_group(name: str, promised: list[Frame], came: list[Frame]) -> list[Difference]:
    left, right = [f.text for f in promised], [f.text for f in came]
    if left == right:
        return []
    found = []
    matcher = difflib.SequenceMatcher(a=left, b=right, autojunk=False)
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        pairs = max(end - start, other_end - other_start)
        for n in range(pairs):
            mine = left[start + n] if start + n < end else ""
            other = right[other_start + n] if other_start + n < other_end else ""
            place = f"#{start + n + 1}" if mine else f"extra after #{end}"
            found.append(Difference(f"{name} {place}", mine, other))
    return found


def _compare_commits(
    promised: dict[tuple[str, str], list[Frame]], came: dict[tuple[str, str], list[Frame]]
) -> list[Difference]:
    """Rows of one transaction have one commit timestamp, on every connection."""
    known: dict[str, str] = {}
    found = []
    for key in promised.keys() & came.keys():
        if len(promised[key]) != len(came[key]):
            continue
        for mine, other in zip(promised[key], came[key], strict=True):
            if mine.commit and other.commit and known.setdefault(mine.commit, other.commit) != other.commit:
                found.append(
                    Difference(f"{' '.join(key)} commit_timestamp", known[mine.commit], other.commit)
                )
    return found


def _compare_handshakes(script: Script, played: Played) -> list[Difference]:
    refused = {step.conn: f"{step.status} {step.body}" for step in script.steps if isinstance(step, Refused)}
    closed = {step.conn: str(step.code) for step in script.steps if isinstance(step, Closed)}
    came = {conn: f"{status} {body}" for conn, (status, body) in played.refused.items()}
    codes = {conn: str(code) for conn, code in played.closed.items()}
    return [
        Difference(f"{conn} {what}", left.get(conn, ""), right.get(conn, ""))
        for what, left, right in (("handshake", refused, came), ("close", closed, codes))
        for conn in sorted(left.keys() | right.keys())
        if left.get(conn) != right.get(conn)
    ]


def _first_difference(left: str, right: str) -> int:
    if not left or not right:
        return 0
    return next(
        (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
