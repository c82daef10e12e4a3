"""What the documentation says of objectives is what the table in code says; what it names is there, commands parse."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib
import io
import re
import shlex
import tomllib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from tutelage.config import load
from tutelage.evaluator.config import (
    ArithmeticConfig,
    EvaluateConfig,
    ExportConfig,
    ItemsConfig,
    ServeConfig,
    SubmitConfig,
    WatchConfig,
)
from tutelage.teacher_server.cli import with_model_flag
from tutelage.teacher_server.config import GenerateConfig, PrecomputeConfig, TeacherConfig
from tutelage.trainer.losses.registry import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
# Besides the pages: what stands in files that a user opens.
OPENED = [*(ROOT / "deploy").rglob("*.yaml"), *(ROOT / "deploy").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
NAMING = [*PAGES, ROOT / "Makefile", *sorted(OPENED)]
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
SUPPORT = {path.stem for path in (ROOT / "tests").glob("*.py")}
"""Modules of the tests that benchmarks use."""
MADE = {"build", "runs"}
"""Folders that commands make."""


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
    "evaluate submit": SubmitConfig,
    "evaluate generate-arithmetic": ArithmeticConfig,
    "evaluate items": ItemsConfig,
    "evaluate watch": WatchConfig,
    "evaluate export": ExportConfig,
    "evaluate": EvaluateConfig,
}
"""Commands whose flags are fields of a configuration, the longer name first."""


def documented_commands() -> list[tuple[str, str]]:
    """Command lines of the pages and the command's name; without the brackets around what may be left out."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = [re.sub(r"[\[\]]", "", line) for line in re.findall(r"^ *tutelage (.*?)(?: &)?$", text, re.MULTILINE)]
    found = [(line, name) for line in lines if (name := next((n for n in CONFIGURED if line.startswith(f"{n} ")), ""))]
    bare = ("evaluate tasks", "evaluate wait", "evaluate list", "evaluate cancel")
    return [(line, name) for line, name in found if "--help" not in line and not line.startswith(bare)]


@pytest.mark.parametrize(("line", "name"), documented_commands())
def test_documented_commands_are_accepted(line, name):
    arguments = shlex.split(line, comments=True)[len(name.split()) :]
    arguments = with_model_flag(arguments) if name in ("teacher serve", "teacher precompute") else arguments
    with pytest.raises(SystemExit) as ended:
        load(CONFIGURED[name], [*arguments, "--dry-run"], program="tutelage", environment_prefix="TUTELAGE_DOCS_")
    assert ended.value.code == 0


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", NAMING, ids=name_of)
def test_every_path_of_the_tree_that_a_page_names_is_there(page):
    named = re.findall(rf"(?<![\w/.<…-])(?:{'|'.join(FOLDERS)})/[\w./*%{{}},-]*[\w/*%}}]", page.read_text())
    for path in {path for path in named if path.split("/")[0] not in MADE}:
        pattern = re.sub(r"\{[^}]*\}|%|NAME", "*", path)
        assert any(ROOT.glob(pattern.rstrip("/"))) or any(page.parent.glob(pattern.rstrip("/"))), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_module_that_a_page_names_is_there(page):
    files = {path.name for folder in FOLDERS if folder not in MADE for path in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"`([\w*]+\.py)`", page.read_text()):
        assert fnmatch.filter(files, name), name
    for name in set(re.findall(r"\btutelage(?:\.\w+)+", page.read_text())):
        assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one; an entry-point group is a name, too."""
    parts = name.split(".")
    if any(group == name for group in entry_points().groups):
        return True
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def commands() -> dict[str, EntryPoint]:
    """As an installation of this tree has them; an editable one that is older than a command does not know it."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["tutelage.commands"]
    return {name: EntryPoint(name, value, "tutelage.commands") for name, value in named.items()}


@cache
def subcommands(command: str) -> set[str]:
    """The names that a command's help lists; none if it takes options only."""
    entry = commands()[command]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        entry.load()(["--help"])
    listed = re.search(r"^commands:\n((?:  .*\n)+)", printed.getvalue(), re.MULTILINE)
    actions = re.findall(r"^ {2,4}(\w[\w-]*)  ", listed[1] if listed else printed.getvalue(), re.MULTILINE)
    return set(actions)


@pytest.mark.parametrize("page", NAMING, ids=name_of)
def test_every_tutelage_command_that_a_page_names_is_there(page):
    line = r"(?:`|^ *#? *|\$\(BIN\)/)tutelage +([\w-]+)(?: +([a-z][\w-]*)(?![\w./=]))?"
    named = re.findall(line, page.read_text(), re.MULTILINE)
    for command, then in named:
        assert command in commands(), command
        if then and subcommands(command):
            assert then in subcommands(command), f"{command} {then}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_target_of_make_that_a_page_names_is_there(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_of_a_program_that_a_page_names_is_there(page):
    for program, flags in re.findall(r"((?:benchmarks|deploy)/[a-z_/]+\.py)((?: +[^\n`#]*)?)", page.read_text()):
        source = (ROOT / program).read_text()
        for flag in re.findall(r"--[a-z][\w-]*", flags):
            assert f'"{flag}"' in source, f"{program} {flag}"


@pytest.mark.parametrize("program", sorted(path for path in OPENED if path.suffix == ".py"), ids=name_of)
def test_every_name_that_a_program_imports_from_the_package_is_there(program):
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tutelage", *SUPPORT):
            for alias in node.names:
                assert resolves(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("program", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_needs_no_model_that_another_one_makes(program):
    named = r'(?<!make_directory_once\()BUILD / "models" / "'
    assert not re.search(named, program.read_text()), "packaged_models.py makes it for the first who wants it"
