"""The Grafana dashboard and the alert rules that are shipped ask for what the processes tell."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import yaml

from tests.stack import ROOT
from tests.unit.test_docs import anchors
from worker.telemetry import METRICS

DASHBOARD = json.loads((ROOT / "deploy/grafana/tailrace.json").read_text())
RULES = ROOT / "deploy/prometheus/tailrace.rules.yaml"
OF_PROMETHEUS = {"job", "instance"}


class Asked(NamedTuple):
    """An expression, where it stands, and the labels that are shown of its result."""

    where: str
    expression: str
    shown: frozenset[str]

    def __str__(self) -> str:
        return self.where

    @property
    def series(self) -> list[tuple[str, str]]:
        """Names with their matchers."""
        return re.findall(r"\b(tailrace_\w+)(?:\{([^}]*)\})?", self.expression)


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def asked() -> Iterator[Asked]:
    for panel in panels():
        for target in panel["targets"]:
            shown = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield Asked(f"{panel['title']} {target['refId']}", target["expr"], shown)
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            inside = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert inside is not None
            yield Asked(f"${variable['name']}", inside[1], frozenset([inside[2]]))
    for rule in rules():
        shown = frozenset(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        yield Asked(rule["alert"], rule["expr"], shown)


def metric_of(name: str) -> tuple[str, bool]:
    """The metric of a series, and whether the series is that of a bucket."""
    for ending in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(ending)
        if base != name and base in METRICS and METRICS[base].kind == "histogram":
            return base, ending == "_bucket"
    return name, False


@pytest.mark.parametrize("one", list(asked()), ids=str)
def test_what_is_asked_for_is_told(one: Asked) -> None:
    assert one.series
    labels = set(OF_PROMETHEUS)
    for name, matchers in one.series:
        metric, bucket = metric_of(name)
        assert metric in METRICS, name
        assert bucket == (METRICS[metric].kind == "histogram"), name
        own = {*METRICS[metric].labels, *OF_PROMETHEUS}
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= own, name
        labels |= own | ({"le"} if bucket else set())
    kept = [re.split(r",\s*", inside) for inside in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", one.expression)]
    assert {label for group in kept for label in group} <= labels
    assert one.shown <= labels
    by = re.search(r"\bby\s*\(([^)]*)\)", one.expression)
    if by is not None:
        assert one.shown <= set(re.split(r",\s*", by[1])), "the legend shows a label that was summed away"


@pytest.mark.parametrize("one", list(asked()), ids=str)
def test_counters_are_asked_for_as_rates_and_gauges_are_not(one: Asked) -> None:
    over_time = set(re.findall(r"\b(?:rate|increase)\((tailrace_\w+)", one.expression))
    for name, _ in one.series:
        counts = METRICS[metric_of(name)[0]].kind in ("counter", "histogram")
        assert (name in over_time) == counts or one.where.startswith("$"), name


@pytest.mark.parametrize("one", list(asked()), ids=str)
def test_an_expression_is_whole(one: Asked) -> None:
    open_ones = []
    for character in re.sub(r'"[^"]*"', "", one.expression):
        if character in "({[":
            open_ones.append(character)
        elif character in ")}]":
            assert open_ones
            assert open_ones.pop() + character in ("()", "{}", "[]")
    assert open_ones == []


def test_every_metric_is_shown() -> None:
    shown = {
        metric_of(name)[0]
        for panel in panels()
        for target in panel["targets"]
        for name, _ in Asked("", target["expr"], frozenset()).series
    }
    assert shown == set(METRICS)


def test_panels_stand_beside_each_other_and_have_names() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    assert all(panel["title"] for panel in DASHBOARD["panels"])
    for one, two in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"], (one, two)
        assert one["x"] + one["w"] <= 24


def test_the_dashboard_names_no_data_source_of_ours() -> None:
    sources = set(re.findall(r'"uid": "([^"]*)"', json.dumps(DASHBOARD)))
    assert sources == {"${datasource}", "tailrace"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
    page, _, section = rule["annotations"]["runbook"].partition("#")
    assert section in anchors(ROOT / page)


def test_alerts_have_different_names() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"Tailrace[A-Z]\w+", name) for name in names)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
