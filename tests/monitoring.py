"""What deploy/monitoring asks Prometheus: every expression of its dashboards and rules, and the metrics in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "monitoring"
DASHBOARDS = ("teacher", "students", "evaluation")
_WORDS = {"and", "or", "unless", "bool"}
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")


@dataclass(frozen=True)
class Expression:
    """One expression and where it stands."""

    where: str
    text: str


def dashboard(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def panels(name: str) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def panel_expressions() -> list[Expression]:
    return [
        Expression(f"{name}: {panel['title']}", target["expr"])
        for name in DASHBOARDS
        for panel in panels(name)
        for target in panel["targets"]
    ]


def rule_expressions() -> list[Expression]:
    return [Expression(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]


def selectors(text: str) -> set[str]:
    """The parts of an expression that name a metric, each with what it says of labels."""
    bare = re.sub(r'"[^"]*"', lambda match: "\0" * len(match[0]), text)
    bare = _GROUPING.sub(lambda match: "\0" * len(match[0]), bare)
    bare = re.sub(r"\[[^]]*\]|\boffset \w+", lambda match: "\0" * len(match[0]), bare)
    labels = re.compile(r"\{[^}]*\}")
    without_labels = labels.sub(lambda match: "\0" * len(match[0]), bare)
    found = set()
    for match in re.finditer(r"(?<![\w:.$])[a-zA-Z_][\w:]*(?![\s\0]*\()(?![\w:])", without_labels):
        if match[0] not in _WORDS:
            after = labels.match(bare, match.end())
            found.add(text[match.start() : after.end() if after else match.end()])
    return found


def metric_of(selector: str) -> str:
    return selector.partition("{")[0]
