"""From a study file to cells whose settings the trainer has checked and filled in.

The trainer itself is asked, by a dry run of its command, so that a study knows nothing of its settings.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.errors import ConfigurationError
from tutelage.study.cells import Cell, base_cells, student_cells, tuning_cells
from tutelage.study.config import ComparisonConfig, Settings, Side, StudyConfig
from tutelage.study.programs import tutelage

_UNNAMED_TEACHER = "127.0.0.1:50051"


@dataclass(frozen=True)
class Study:
    """A study and all its cells."""

    config: StudyConfig
    base: tuple[Cell, ...]
    tuned: tuple[Cell, ...]
    students: tuple[Cell, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All of them, in the order in which they can be done."""
        return (*self.base, *self.tuned, *self.students)

    def teacher_cell(self, name: str) -> Cell:
        """The cell whose checkpoint a teacher is."""
        teacher = self.config.teachers[name]
        tuned = teacher.tuned and not teacher.address
        return next(cell for cell in (self.tuned if tuned else self.base) if cell.model == teacher.model)

    def students_of(self, teacher: str) -> list[Cell]:
        """The students that need a teacher; "" for those that need none."""
        return [cell for cell in self.students if cell.teacher == teacher]

    def rationales_file(self, cell: Cell) -> str:
        """Name of the file of what the cell's teacher wrote: another teacher, data or way of writing, another file."""
        content = [self.teacher_cell(cell.teacher).id, _content(self.config, cell), cell.settings["data"]["template"]]
        content.append(cell.settings["batch"]["max_tokens"])
        return f"{cell.teacher}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}.jsonl"

    def evaluation_id(self, cell: Cell) -> str:
        """Names the scoring of a cell on the study's tasks; other tasks, another name."""
        digest = hashlib.sha256(self.config.evaluation.model_dump_json().encode()).hexdigest()
        return f"{self.config.name}.{cell.id}.{digest[:8]}"


def cohort(study: StudyConfig, cells: Iterable[Cell], inits: Mapping[str, Path], teacher: str | None) -> dict[str, Any]:
    """The trainer's configuration file of some cells.

    Args:
        study: the study.
        cells: with ids.
        inits: what each starts from, by id.
        teacher: host:port; None if no cell needs one.

    """
    students = [{"id": cell.id, "init": str(inits[cell.id]), **cell.settings} for cell in cells]
    return {
        "run": study.name,
        "output": str(study.output.resolve()),
        "teacher": {"address": teacher} if teacher else None,
        "concurrency": study.concurrency,
        "students": students,
    }


def resolve(study: StudyConfig) -> Study:
    """Builds every cell, lets the trainer check it, and names it.

    Raises:
        ConfigurationError: the trainer refuses a setting; its own words say which and why.

    """
    base, tuned, students = base_cells(study), tuning_cells(study), student_cells(study)
    drafts = [*base, *tuned, *students]
    resolved = _settings_of(study, drafts)
    _check_lengths(drafts, resolved)
    names: dict[int, Cell] = {}
    starts: dict[str, str] = {}
    for cell in base:
        named = cell.named(resolved[id(cell)], study.models[cell.model].path, _content(study, cell))
        names[id(cell)], starts[cell.model] = named, named.id if cell.settings else named.start
    for cell in tuned:
        names[id(cell)] = cell.named(resolved[id(cell)], starts[cell.model], _content(study, cell))
    done = Study(study, tuple(names[id(cell)] for cell in base), tuple(names[id(cell)] for cell in tuned), ())
    for cell in students:
        teacher = done.teacher_cell(cell.teacher).id if cell.teacher else ""
        besides = _content(study, cell) | {"teacher": teacher}
        names[id(cell)] = cell.named(resolved[id(cell)], starts[cell.model], besides)
    complete = Study(study, done.base, done.tuned, tuple(names[id(cell)] for cell in students))
    _check_comparisons(complete)
    return complete


def _check_lengths(drafts: Sequence[Cell], resolved: Mapping[int, Settings]) -> None:
    """A finished training is known by the step of its last checkpoint."""
    for cell in drafts:
        settings = resolved[id(cell)]
        if settings and (settings["epochs"] or (settings["best"] or {}).get("patience")):
            raise ConfigurationError(
                f"{cell.role} {cell.model} {cell.method} would end by epochs or patience; a study must know its last "
                "step: give `steps`, with `epochs: null` where a preset has epochs",
                "settings.steps",
            )


def _check_comparisons(study: Study) -> None:
    """Both sides of every comparison must be in the grid, each with one cell a student and seed."""
    for comparison in study.config.comparisons:
        first, second = (_runs(study, comparison, side) for side in (comparison.first, comparison.second))
        if not first or first != second:
            raise ConfigurationError(
                f"its sides have {len(first)} and {len(second)} cells; the grid must have both for the same students",
                comparison.name,
            )


def _runs(study: Study, comparison: ComparisonConfig, side: Mapping[Side, str | float]) -> set[tuple[str, int]]:
    """Student and seed of the cells of one side."""
    cells = [cell for cell in study.students if all(getattr(cell, key) == value for key, value in side.items())]
    runs = [(cell.model, cell.seed) for cell in cells if cell.model in (comparison.students or study.config.students)]
    if len(set(runs)) < len(runs):
        raise ConfigurationError(f"{dict(side)} is several cells a student and seed; say which", comparison.name)
    return set(runs)


def _settings_of(study: StudyConfig, drafts: Sequence[Cell]) -> dict[int, Settings]:
    """What the trainer makes of each draft's settings, by the draft's identity."""
    trained = [cell for cell in drafts if cell.settings]
    students = [{"id": f"cell-{place}", "init": ".", **cell.settings} for place, cell in enumerate(trained)]
    teacher = {"address": _UNNAMED_TEACHER}
    answer = _dry_run({"run": study.name, "teacher": teacher, "students": students})
    settings: dict[int, Settings] = {id(cell): {} for cell in drafts}
    return settings | {id(cell): filled for cell, filled in zip(trained, answer["students"], strict=True)}


def _dry_run(content: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        command = [*tutelage("train"), "--config", file.name, "--dry-run"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ConfigurationError(f"the trainer refuses this study: {ran.stderr.strip()}", "settings")
    filled: dict[str, Any] = yaml.safe_load(ran.stdout)
    return filled


def _content(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    """What decides a cell's data: the file's content (its name while it is not there), and how a teacher wrote."""
    if not cell.settings:
        return {}
    path = Path(cell.settings["data"]["path"])
    content = {"data": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)}
    return content | ({"rationales": study.rationales.model_dump()} if cell.rationales else {})
