"""The goals: one row for each, with the figures that decide it. Pure.

A goal is about figures of one run, most of them ratios: what another machine does faster it does faster for
both sides.
"""

from dataclasses import dataclass
from typing import Final

from benchmarks.report import Goal, Part, Report

APART: Final = ("poison",)
"""Benchmarks that a run of all leaves out."""
FLOOR_BATCH: Final = "drain: floor, batches of 500"
GLUE_DEFAULT: Final = "drain: glue, arq with its defaults, 1 worker"
GLUE_TUNED: Final = "drain: glue, arq tuned, 1 worker"


@dataclass(frozen=True)
class Wanted:
    """One figure of a goal.

    Attributes:
        name: in words.
        case: of the result.
        limit: which the figure must reach, or with `most` not exceed.
        unit: of the limit.
        of: the case by which it is divided, where a ratio is wanted.
        most: the limit is the most that is good.
        below: the limit itself is not good.
    """

    name: str
    case: str
    limit: float
    unit: str
    of: str | None = None
    most: bool = False
    below: bool = False

    def judged(self, report: Report) -> Part:
        """Look at what was found."""
        sign = "<" if self.below else "≤" if self.most else "≥"
        wanted = f"{sign} {self.limit:,g} {self.unit}"
        value = report.found(self.case)
        if value is not None and self.of is not None:
            other = report.found(self.of)
            value = None if not other else value / other * (100 if self.unit.startswith("%") else 1)
        if value is None:
            return Part(self.name, wanted, None, self.unit, met=False)
        met = value < self.limit if self.below else value <= self.limit if self.most else value >= self.limit
        return Part(self.name, wanted, round(value, 3), self.unit, met)


@dataclass(frozen=True)
class Row:
    """One goal.

    Attributes:
        benchmark: which measures it; None: any.
        name: of the goal.
        goal: in words.
        wanted: its figures.
    """

    benchmark: str | None
    name: str
    goal: str
    wanted: tuple[Wanted, ...]


_BATCH = "drain: change handler, batch=500, 2 workers"
ROWS: Final = (
    Row(
        "drain",
        "drain, batch upsert, 2 workers",
        "≥ 60% of the floor; ≥ 15 times tuned glue; ≥ 75 times default glue; ≥ 20,000 changes/s here",
        (
            Wanted("of the floor", _BATCH, 60, "%", FLOOR_BATCH),
            Wanted("of tuned glue", _BATCH, 15, "times", GLUE_TUNED),
            Wanted("of default glue", _BATCH, 75, "times", GLUE_DEFAULT),
            Wanted("rate", _BATCH, 20_000, "changes/s"),
        ),
    ),
    Row(
        "drain",
        "drain, change handler one at a time",
        "≥ 5 times tuned glue",
        (Wanted("of tuned glue", "drain: change handler, one at a time, 1 worker", 5, "times", GLUE_TUNED),),
    ),
    Row(
        "end-to-end",
        "end-to-end proven stream, everything on 2 cores",
        "≥ 10,000 changes/s sustained for 60 s",
        (
            Wanted("rate", "end-to-end: stream, whole run", 10_000, "changes/s"),
            Wanted("length", "end-to-end: stream, length of the run", 60, "s"),
        ),
    ),
    Row(
        "latency",
        "latency proven stream at 200/s",
        "p50 ≤ 4 ms, p99 ≤ 20 ms",
        (
            Wanted("p50", "latency: stream, 200/s, p50", 4, "ms", most=True),
            Wanted("p99", "latency: stream, 200/s, p99", 20, "ms", most=True),
        ),
    ),
    Row(
        "latency",
        "latency added over the frame, plain, at 200/s",
        "p50 ≤ 4 ms, p99 ≤ 20 ms",
        (
            Wanted("p50", "latency: plain, 200/s, over the frame, p50", 4, "ms", most=True),
            Wanted("p99", "latency: plain, 200/s, over the frame, p99", 20, "ms", most=True),
        ),
    ),
    Row(
        "catch-up",
        "catch-up",
        "≥ 15,000 changes/s",
        (Wanted("rate", "catch-up: stream", 15_000, "changes/s"),),
    ),
    Row(
        "scale",
        "scale",
        "1M backlog drains within 15% of the rate of 10k; 50 handlers on one table cost at most 50 times one;"
        " 200 tables no slower than 20; hot key with a derive handler faster than distinct keys",
        (
            Wanted(
                "backlog of 1M, of the rate of 10k",
                "scale: backlog of 1,000,000",
                85,
                "%",
                "scale: backlog of 10,000",
            ),
            Wanted(
                "cost of a change with 50 handlers, of one",
                "scale: cost with 50 handlers",
                50,
                "times",
                "scale: cost with 1 handler",
                most=True,
            ),
            Wanted("200 tables, of 20", "scale: 200 tables", 100, "%", "scale: 20 tables"),
            Wanted("hot key, of distinct keys", "scale: hot key", 100, "%", "scale: distinct keys"),
        ),
    ),
    Row(
        "poison",
        "1% poison among 20,000 changes over 500 keys",
        "≥ 50% of the clean run",
        (
            *(
                Wanted(name, f"poison: {kind}, with poison", 50, "%", f"poison: {kind}, clean")
                for name, kind in (
                    ("one at a time", "change handler, one at a time"),
                    ("batch=500", "change handler, batch=500"),
                    ("derive", "derive handler"),
                )
            ),
        ),
    ),
    Row(
        None,
        "memory",
        "every process under 150 MiB at any backlog",
        (Wanted("largest process", "memory: largest process", 150, "MiB", most=True, below=True),),
    ),
    Row(
        "idle",
        "idle",
        "under 1% of a core per process, under 100 MiB",
        (
            Wanted("busiest process", "idle: busiest process", 1, "% of a core", most=True, below=True),
            Wanted("largest process", "idle: largest process", 100, "MiB", most=True, below=True),
        ),
    ),
)


def judge(report: Report) -> None:
    """Add to the report the goals that its benchmark measures; all but those apart, if it ran all."""
    for row in ROWS:
        every = report.name == "all" and row.benchmark not in APART
        if every or report.name == row.benchmark or _was_found(row, report):
            report.goals.append(Goal.of(row.name, row.goal, [one.judged(report) for one in row.wanted]))


def _was_found(row: Row, report: Report) -> bool:
    return any(report.found(one.case) is not None for one in row.wanted)
