"""What a benchmark has found: medians of rounds with their spread, goals, failures, and the machine.

As text and JSON. Pure but for `machine`, which looks at the machine. It knows no benchmark.
"""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One figure: its median over rounds.

    Attributes:
        case: what was measured.
        value: median of the rounds.
        unit: of the value, the rounds and the spread.
        rounds: what each round gave, in their order.
        spread: least and greatest round.
        ratio: to the floor of the same run, where there is one.
    """

    case: str
    value: float
    unit: str
    rounds: tuple[float, ...]
    spread: tuple[float, float]
    ratio: float | None = None


@dataclass(frozen=True)
class Part:
    """One number of a goal: its value is None where it could not be measured."""

    name: str
    wanted: str
    value: float | None
    unit: str
    met: bool


@dataclass(frozen=True)
class Goal:
    """What was aimed at, and what came of it: met if all of its parts are."""

    name: str
    goal: str
    value: str
    met: bool
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, name: str, goal: str, parts: Sequence[Part]) -> "Goal":
        """Put the parts together."""
        value = "; ".join(f"{part.name}: {_found(part)}" for part in parts)
        return cls(name, goal, value, all(part.met for part in parts), tuple(parts))


@dataclass(frozen=True)
class Failure:
    """A case that could not be measured."""

    case: str
    error: str


@dataclass
class Report:
    """All figures of one run."""

    name: str
    command: str
    machine: str
    load_before: float = 0.0
    """Load average of the last minute before the run: above about 0.3, others were at work."""
    load_after: float = 0.0
    seconds: float = 0.0
    """How long the run took."""
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    """The most memory of any process of a kind, in MiB."""

    def add(self, case: str, unit: str, rounds: Sequence[float], *, floor: float | None = None) -> Result:
        """Add a figure; with `floor`, also its ratio to it."""
        value = statistics.median(rounds)
        ratio = None if floor is None else round(value / floor, 3)
        kept = tuple(round(one, 3) for one in rounds)
        result = Result(case, round(value, 3), unit, kept, (min(kept), max(kept)), ratio)
        self.results.append(result)
        return result

    def found(self, case: str) -> float | None:
        """Return the figure of a case, or None if there is none."""
        return next((one.value for one in self.results if one.case == case), None)

    def note(self, text: str) -> None:
        """Add a note, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, why: str) -> None:
        """Note that a case was left out, and why, unless that is noted already."""
        if why not in self.skipped:
            self.skipped.append(why)

    def remember(self, memory: Mapping[str, float]) -> None:
        """Take the most memory that processes have had, in MiB, from one of the cases."""
        for kind, mib in memory.items():
            self.memory[kind] = max(self.memory.get(kind, 0.0), mib)

    def add_memory(self) -> None:
        """Add what was remembered as figures."""
        for kind, mib in sorted(self.memory.items()):
            self.add(f"memory: {kind}", "MiB", [mib])
        if self.memory:
            self.add("memory: largest process", "MiB", [max(self.memory.values())])

    def fail(self, case: str, error: BaseException) -> None:
        """Note that a case could not be measured."""
        self.failed.append(Failure(case, f"{type(error).__name__}: {error}"))

    def below(self, name: str, value: float, limit: float, unit: str) -> None:
        """Add a goal of one number: the value stays below a limit."""
        wanted = f"< {limit:g} {unit}"
        part = Part(name, wanted, round(value, 3), unit, value < limit)
        self.goals.append(Goal.of(name, wanted, [part]))

    def json(self) -> bytes:
        """Return it as JSON."""
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)

    def text(self) -> str:
        """Return it as tables for a terminal."""
        console = Console(width=120)
        with console.capture() as captured:
            figures = Table("case", "median", "least", "greatest", "unit", "of the floor")
            for one in self.results:
                ratio = "" if one.ratio is None else f"{one.ratio:.0%}"
                numbers = [number(value) for value in (one.value, *one.spread)]
                figures.add_row(one.case, *numbers, one.unit, ratio)
            console.print(figures)
            if self.goals:
                goals = Table("goal", "wanted", "found", "met")
                for goal in self.goals:
                    for at, part in enumerate(goal.parts):
                        name = goal.name if at == 0 else ""
                        wanted = part.wanted if part.name == goal.name else f"{part.name}: {part.wanted}"
                        goals.add_row(name, wanted, _found(part), "yes" if part.met else "NO")
                console.print(goals)
            for failure in self.failed:
                console.print(f"failed: {failure.case}: {failure.error}", markup=False)
            for note in self.skipped:
                console.print(f"skipped: {note}", markup=False)
            for note in self.notes:
                console.print(note, markup=False)
            console.print(
                f"load average: {self.load_before:.1f} before, {self.load_after:.1f} after;"
                f" {self.seconds:.0f} s"
            )
        return captured.get()

    def markdown(self) -> str:
        """Return it as tables for a page."""
        lines = [f"`{self.command}`, {self.seconds / 60:.0f} minutes, on {self.machine};"]
        lines += [f"load average {self.load_before:.1f} before, {self.load_after:.1f} after.", ""]
        lines += ["| goal | wanted | found | met |", "|---|---|---|---|"]
        for goal in self.goals:
            lines.append(f"| {goal.name} | {goal.goal} | {goal.value} | {'yes' if goal.met else '**no**'} |")
        lines += [
            "",
            "| case | median | least to greatest round | rounds | of the floor |",
            "|---|---|---|---|---|",
        ]
        for one in self.results:
            ratio = "" if one.ratio is None else f"{one.ratio:.0%}"
            spread = f"{number(one.spread[0])} to {number(one.spread[1])}"
            found = f"{number(one.value)} {one.unit}"
            lines.append(f"| {one.case} | {found} | {spread} | {len(one.rounds)} | {ratio} |")
        lines.append("")
        lines += [f"* failed: {one.case}: {one.error.splitlines()[0]}" for one in self.failed]
        lines += [f"* skipped: {one}" for one in self.skipped]
        lines += [f"* {one}" for one in self.notes]
        return "\n".join([*lines, ""])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 and max, by nearest rank."""
    ordered = sorted(values)
    ranks = {name: -(-share * len(ordered) // 100) - 1 for name, share in _SHARES.items()}
    return {name: ordered[max(0, rank)] for name, rank in ranks.items()}


_SHARES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


def machine() -> str:
    """Describe the machine in a line."""
    model = platform.processor() or platform.machine()
    memory = ""
    for path, name in ((Path("/proc/cpuinfo"), "model name"), (Path("/proc/meminfo"), "MemTotal")):
        if not path.exists():
            continue
        found = next((line for line in path.read_text().splitlines() if line.startswith(name)), None)
        if found is None:
            continue
        value = found.partition(":")[2].strip()
        if name == "MemTotal":
            memory = f", {int(value.split()[0]) / 2**20:.0f} GiB"
        else:
            model = value
    system = f"{platform.system()} {platform.release()}"
    return f"{os.cpu_count()} cores of {model}{memory}, {system}, Python {platform.python_version()}"


def number(value: float) -> str:
    """Write a figure as people read it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"


def _found(part: Part) -> str:
    return "not measured" if part.value is None else f"{number(part.value)} {part.unit}"
