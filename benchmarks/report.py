"""What a benchmark has found: medians of rounds with their spread, goals, and the machine; as text and JSON.

Pure but for `machine`, which looks at the machine. It knows no benchmark.
"""

import os
import platform
import statistics
from collections.abc import Sequence
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
class Goal:
    """What was aimed at, and what came of it."""

    name: str
    goal: str
    value: float
    met: bool


@dataclass
class Report:
    """All figures of one run of one benchmark."""

    name: str
    command: str
    machine: str
    load_before: float = 0.0
    """Load average of the last minute before the run: above about 0.3, others were at work."""
    load_after: float = 0.0
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def add(self, case: str, unit: str, rounds: Sequence[float], *, floor: float | None = None) -> Result:
        """Add a figure; with `floor`, also its ratio to it."""
        value = statistics.median(rounds)
        ratio = None if floor is None else round(value / floor, 3)
        kept = tuple(round(one, 3) for one in rounds)
        result = Result(case, round(value, 3), unit, kept, (min(kept), max(kept)), ratio)
        self.results.append(result)
        return result

    def below(self, name: str, value: float, limit: float, unit: str) -> None:
        """Add a goal: the value stays below a limit."""
        self.goals.append(Goal(name, f"< {limit:g} {unit}", round(value, 3), value < limit))

    def json(self) -> bytes:
        """Return it as JSON."""
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)

    def text(self) -> str:
        """Return it as tables for a terminal."""
        console = Console(width=110)
        with console.capture() as captured:
            figures = Table("case", "median", "least", "greatest", "unit", "of the floor")
            for one in self.results:
                ratio = "" if one.ratio is None else f"{one.ratio:.0%}"
                numbers = [_number(number) for number in (one.value, *one.spread)]
                figures.add_row(one.case, *numbers, one.unit, ratio)
            console.print(figures)
            if self.goals:
                goals = Table("goal", "wanted", "found", "met")
                for goal in self.goals:
                    goals.add_row(goal.name, goal.goal, _number(goal.value), "yes" if goal.met else "NO")
                console.print(goals)
            for note in self.notes:
                console.print(note)
            console.print(f"load average: {self.load_before:.1f} before, {self.load_after:.1f} after")
        return captured.get()


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


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"
