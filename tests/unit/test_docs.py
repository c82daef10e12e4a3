"""What the documentation says of objectives is what the table in code says; links lead somewhere, commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tutelage.config import load
from tutelage.evaluator.config import EvaluateConfig, ExportConfig, ServeConfig, WatchConfig
from tutelage.teacher_server.config import GenerateConfig, PrecomputeConfig, TeacherConfig
from tutelage.trainer.losses.registry import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_documented_row_is_the_tables(name):
    row = OBJECTIVES[name]
    definition = row.definition.replace("|", r"\|")
    start = f"| `{name}` | {definition} | {row.data} | {', '.join(row.exact) or '–'} |"
    assert start in (ROOT / "docs" / "objectives.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["reliability.md", "objectives.md"])
def test_every_promise_names_a_test_that_exists(page):
    text = (ROOT / "docs" / page).read_text()
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests/numerics/test_traps.py").read_text(), name


CONFIGURED = {
    "teacher serve": TeacherConfig,
    "teacher precompute": PrecomputeConfig,
    "teacher write": GenerateConfig,
    "evaluate serve": ServeConfig,
    "evaluate watch": WatchConfig,
    "evaluate export": ExportConfig,
    "evaluate": EvaluateConfig,
}
"""Commands whose flags are fields of a configuration, the longer name first."""


def documented_commands() -> list[tuple[str, str]]:
    """Command lines of the pages and the command's name; without the brackets around what may be left out."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = [re.sub(r"[\[\]]", "", line) for line in re.findall(r"^ *tutelage (.*)$", text, re.MULTILINE)]
    found = [(line, name) for line in lines if (name := next((n for n in CONFIGURED if line.startswith(f"{n} ")), ""))]
    return [(line, name) for line, name in found if "--help" not in line and not line.startswith("evaluate tasks")]


@pytest.mark.parametrize(("line", "name"), documented_commands())
def test_documented_commands_are_accepted(line, name):
    arguments = shlex.split(line, comments=True)[len(name.split()) :]
    with pytest.raises(SystemExit) as ended:
        load(CONFIGURED[name], [*arguments, "--dry-run"], program="tutelage", environment_prefix="TUTELAGE_DOCS_")
    assert ended.value.code == 0
