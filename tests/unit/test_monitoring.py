"""Dashboards and alerts: what they ask for is exported by the code, and Grafana and Prometheus can read them.

That the expressions have answers is seen with a real Prometheus (tests/integration/shared_teacher/test_monitoring.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fake_teacher import FakeScoringEngine, fake_teacher
from monitoring import (
    DASHBOARDS,
    FOLDER,
    dashboard,
    metric_of,
    panel_expressions,
    panels,
    rule_expressions,
    rules,
    selectors,
)
from tutelage.evaluator.service.metrics import EvaluatorCollector
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.server.metrics import TeacherCollector
from tutelage.teacher_server.server.servicer import TeacherServicer
from tutelage.trainer.metrics import prometheus as gauges

OF_PROMETHEUS = {"up"}


def source_of(package: str, path: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    return (Path(next(iter(spec.submodule_search_locations))) / path).read_text(encoding="utf-8")


def exported_names(families) -> set[str]:
    """As Prometheus has them: a counter ends in `_total`."""
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


async def of_the_teacher(tmp_path: Path) -> set[str]:
    servicer = TeacherServicer(max_streams=1, stream_bytes=1, stall_seconds=1)
    config = TeacherConfig.model_validate({"model": "x", "store": {"path": str(tmp_path)}})
    servicer.open(fake_teacher(FakeScoringEngine()))
    return exported_names(TeacherCollector(servicer, config).collect())


def of_the_evaluator(tmp_path: Path) -> set[str]:
    return exported_names(EvaluatorCollector(list, lambda: True, {"frames": tmp_path}).collect())


def of_the_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names = []

    class Named:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            names.append(f"ray_{name}")  # the prefix that Ray gives all of them

        def set_default_tags(self, tags: dict[str, str]) -> None: ...

        def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...

    monkeypatch.setattr(gauges, "Gauge", Named)
    gauges.PrometheusGauges("run", "ann", tmp_path)
    return set(names)


def of_vllm() -> set[str]:
    made = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="([^"]+)"', source_of("vllm", "v1/metrics/loggers.py"))
    ends = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + end for kind, name in made for end in ends[kind]}


def of_ray() -> set[str]:
    """What its agent sets, and what Ray's own dashboard asks of its C++."""
    agent = re.findall(r'^    "(\w+)": Gauge\(', source_of("ray", "dashboard/modules/reporter/reporter_agent.py"), re.M)
    core = re.findall(
        r"\bray_\w+", source_of("ray", "dashboard/modules/metrics/dashboards/default_dashboard_panels.py")
    )
    return {f"ray_{name}" for name in agent} | set(core)


async def test_every_metric_that_is_asked_for_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = OF_PROMETHEUS | recorded | of_vllm() | of_ray()
    known |= await of_the_teacher(tmp_path) | of_the_evaluator(tmp_path) | of_the_students(tmp_path, monkeypatch)
    asked = {
        metric_of(selector): each.where
        for each in (*panel_expressions(), *rule_expressions())
        for selector in selectors(each.text)
    }
    assert {name: where for name, where in asked.items() if name not in known} == {}
    assert len(asked) > 60  # else the expressions were not read


async def test_what_is_exported_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of ours that nobody draws or is told of is forgotten, or should not be there."""
    ours = await of_the_teacher(tmp_path) | of_the_evaluator(tmp_path) | of_the_students(tmp_path, monkeypatch)
    asked = {metric_of(s) for each in (*panel_expressions(), *rule_expressions()) for s in selectors(each.text)}
    assert ours - asked == {
        "tutelage_teacher_tokens_total"
    }  # those of the sequences; computed and cached ones are drawn


async def test_counters_end_in_total_and_units_are_in_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = await of_the_teacher(tmp_path) | of_the_evaluator(tmp_path) | of_the_students(tmp_path, monkeypatch)
    counted = {f"tutelage_teacher_{field}_total" for field in pb.StudentUsage.DESCRIPTOR.fields_by_name}
    assert {name for name in ours if name.endswith("_total")} <= counted | {
        f"tutelage_teacher_engine_{name}_total" for name in ("passes", "busy_seconds")
    } | {"tutelage_teacher_head_busy_seconds_total"}
    assert [name for name in ours if re.search(r"(_ms|_mib|_minutes|_percent)(_|$)", name)] == []


def implied_unit(expression: str) -> str | None:
    """What a panel of one metric, or of a share of two alike, has to be drawn in; None if that cannot be said."""
    names = sorted({metric_of(selector) for selector in selectors(expression)})
    of_time = [name for name in names if "_seconds" in name and "per_second" not in name and "timestamp" not in name]
    parts = expression.split(" / ")
    if len(parts) == 2 and ("seconds" in parts[0]) == ("seconds" in parts[1]) and len(names) > 1:
        return None if "iteration_tokens" in expression else "percentunit"
    if len(parts) == 2:
        return "s" if of_time else None
    if all(name.endswith("_bytes_total") for name in names):
        return "Bps"
    if of_time and all("_seconds_total" in name for name in names):
        return "percentunit"
    if of_time:
        return "s"
    if all(re.search(r"_bytes$|_memory$|_mem_", name) for name in names):
        return "bytes"
    if all(re.search(r"_perc$|:ratio$", name) for name in names):
        return "percentunit"
    if all("utilization" in name for name in names):
        return "percent"
    return "decmbytes" if all("gram" in name for name in names) else "short"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_units_are_those_of_the_metrics(name: str) -> None:
    wrong = {}
    for panel in panels(name):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            implied = implied_unit(target["expr"])
            # Requests a second and yes or no have units of their own, in which nothing is converted.
            drawn = "short" if unit in ("reqps", "none") else unit
            if implied not in (None, drawn):
                wrong[panel["title"]] = (target["expr"], unit, implied)
    assert wrong == {}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_takes(name: str) -> None:
    content = dashboard(name)
    assert content["uid"] == {"evaluation": "tutelage-evaluation"}.get(name, f"tutelage-{name}")
    assert content["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    numbers = Counter(panel["id"] for panel in content["panels"])
    assert max(numbers.values()) == 1
    used = set(re.findall(r"\$\{?(\w+)", "".join(t["expr"] for p in panels(name) for t in p["targets"])))
    assert used - {"__rate_interval"} == variables.keys() - {"datasource"}
    for panel in panels(name):
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources), panel["title"]
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids), panel["title"]
        assert not any(first["expr"] == second["expr"] for first, second in pairwise(panel["targets"])), panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_lie_beside_each_other(name: str) -> None:
    cells = Counter(
        (column, row)
        for panel in dashboard(name)["panels"]
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(cells.values()) == 1
    assert max(column for column, _ in cells) < 24


def test_an_alert_says_what_it_is_and_what_to_do_and_when_it_comes_is_chosen() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "description", "what_to_do"}, alert["alert"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["for"]
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    comes = {case["alertname"] for case in cases if case["exp_alerts"]}
    does_not = {case["alertname"] for case in cases if not case["exp_alerts"]}
    names = {alert["alert"] for alert in alerts}
    assert comes == names
    assert names - does_not == {"TutelageTeacherAway"}  # in one case, one server of three is away
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml"), ("check", "config", "prometheus.yaml")],
)
def test_promtool_finds_nothing(arguments: tuple[str, ...]) -> None:
    told = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stdout + told.stderr
