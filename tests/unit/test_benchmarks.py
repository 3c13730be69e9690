"""What benchmarks write: figures, and one goal for each row of their table, met or not."""

import asyncio
import json
from xml.etree import ElementTree as ET

import pytest

from benchmarks import suite
from benchmarks.contenders import Contender, interleave
from benchmarks.goals import APART, ROWS, Wanted, judge
from benchmarks.plot import drawn
from benchmarks.report import Report
from examples.demo.processes import DemoError


def report(name: str = "all") -> Report:
    return Report(name=name, command=f"python -m benchmarks {name}", machine="2 cores")


def test_a_figure_is_the_median_of_its_rounds_with_the_least_and_the_greatest() -> None:
    made = report()
    made.add("floor", "changes/s", [100, 300, 200])
    made.add("ours", "changes/s", [50, 90, 100], floor=200)
    floor, ours = json.loads(made.json())["results"]
    assert floor == {
        "case": "floor",
        "value": 200,
        "unit": "changes/s",
        "rounds": [100, 300, 200],
        "spread": [100, 300],
        "ratio": None,
    }
    assert ours["ratio"] == 0.45


def test_a_run_of_all_has_each_goal_once_and_what_was_not_measured_is_not_met() -> None:
    made = report()
    judge(made)
    written = json.loads(made.json())["goals"]
    assert [goal["name"] for goal in written] == [row.name for row in ROWS if row.benchmark not in APART]
    assert len(written) == 9
    assert not any(goal["met"] for goal in written)
    assert all("not measured" in goal["value"] for goal in written)
    made.text()  # can be shown


WANTED = [(row.name, one) for row in ROWS for one in row.wanted]


@pytest.mark.parametrize(("name", "wanted"), WANTED, ids=[f"{name}: {one.name}" for name, one in WANTED])
def test_a_figure_is_held_against_its_limit(name: str, wanted: Wanted) -> None:
    def met(factor: float) -> bool:
        made = report()
        value = wanted.limit * factor
        if wanted.of:
            made.add(wanted.of, "changes/s", [1])
            value /= 100 if wanted.unit == "%" else 1
        made.add(wanted.case, "changes/s", [value])
        return wanted.judged(made).met

    assert (met(1.01), met(0.99)) == ((False, True) if wanted.most else (True, False)), name


async def test_contenders_take_turns_and_one_that_fails_is_named_and_does_not_stop_the_others() -> None:
    order = list[str]()

    def contender(case: str, figures: list[float]) -> Contender:
        async def measure() -> float:
            order.append(case)
            if not figures:
                raise DemoError("the worker ended")
            return figures.pop(0)

        return Contender(case, measure, floor="floor")

    made = report()
    cases = [contender("floor", [10, 10, 10]), contender("ours", [4]), contender("glue", [1, 2, 3])]
    await interleave(made, cases, 3, "changes/s")
    assert order == ["floor", "ours", "glue", "floor", "ours", "glue", "floor", "glue"]
    assert [(one.case, one.error) for one in made.failed] == [("ours", "DemoError: the worker ended")]
    assert [(one.case, one.value, one.rounds) for one in made.results] == [
        ("floor", 10, (10, 10, 10)),
        ("ours", 4, (4,)),
        ("glue", 2, (1, 2, 3)),
    ]


async def test_a_round_that_takes_too_long_is_a_failure() -> None:
    made = report()
    await interleave(made, [Contender("ours", asyncio.Event().wait, seconds=0.01)], 1, "changes/s")  # type: ignore[arg-type]
    assert [(one.case, one.error) for one in made.failed] == [("ours", "DemoError: not done after 0.01 s")]


def test_what_is_drawn_are_the_rates_and_it_is_xml() -> None:
    made = report()
    made.add("drain: floor, <batches>", "changes/s", [100, 300, 200])
    made.add("latency: stream", "ms", [4])
    drawing = ET.fromstring(drawn(made))  # noqa: S314 - it is our own
    texts = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "drain: floor, <batches>" in texts
    assert "200" in texts
    assert "latency: stream" not in texts


def test_a_page_has_goals_figures_and_what_failed() -> None:
    made = report()
    made.add("scale: hot key", "changes/s", [1, 2, 4])
    made.fail("scale: lanes", DemoError("ended\nwith a log"))
    judge(made)
    lines = made.markdown().splitlines()
    assert "| scale: hot key | 2.00 changes/s | 1.00 to 4.00 | 3 |  |" in lines
    assert "* failed: scale: lanes: DemoError: ended" in lines
    assert sum("| **no** |" in line for line in lines) == len(made.goals)


async def test_a_benchmark_that_fails_is_named_and_the_next_one_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, saved = report(), list[int]()

    async def fails(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    async def works(report: Report, **_: object) -> None:
        report.add("scale: hot key", "changes/s", [1])

    monkeypatch.setattr("benchmarks.suite.idle.measure", fails)
    monkeypatch.setattr("benchmarks.suite.scale.measure", works)
    await suite.measure(
        made,
        rounds=1,
        share=1,
        only=["idle", "scale"],
        measured=lambda: saved.append(len(made.results)),
    )
    assert [(one.case, one.error) for one in made.failed] == [("idle", "ValueError: no such thing")]
    assert saved == [0, 1]
