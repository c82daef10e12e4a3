"""What the documentation says of the objectives is what the table in code says; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.objectives.table import OBJECTIVES

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
