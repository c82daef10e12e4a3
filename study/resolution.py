"""From a study file to cells whose settings the trainer has checked and filled in.

The trainer itself is asked, by a dry run of its command, so that a study knows nothing of its settings.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import validate
from tutelage.data.hub import local_file, local_model
from tutelage.data.models import check_model
from tutelage.data.rows import read_rows
from tutelage.errors import ConfigurationError, DataError
from tutelage.rpc.tls import ServerTls
from tutelage.rpc.transport import check_access, check_server
from tutelage.runtime.programs import flags, tutelage
from tutelage.study.cells import (
    Cell,
    CellKey,
    base_cells,
    key_of,
    sources,
    start_key,
    student_cells,
    tuning_cells,
)
from tutelage.study.config import ComparisonConfig, Settings, Side, StudyConfig
from tutelage.study.controls import SAME_TOKENS, all_methods
from tutelage.study.folder import Folder

_UNNAMED_TEACHER = "127.0.0.1:50051"
_LONGEST_STUDY_NAME = 59  # in an evaluation's id, which has 128 characters at most: 59 + 1 + a cell's 59 + 1 + 8


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

    def members(self, name: str) -> tuple[str, ...]:
        """The teachers that are served for one: itself, or those that it consists of."""
        return self.config.teachers[name].members or (name,)

    def teacher_id(self, name: str) -> str | dict[str, str]:
        """What decides a teacher: the id of its cell, or those of its members by name; "" without one."""
        if not name:
            return ""
        cells = {member: self.teacher_cell(member).id for member in self.members(name)}
        return cells if self.config.teachers[name].members else cells[name]

    def teacher_cell(self, name: str) -> Cell:
        """The cell whose checkpoint a teacher of one model is."""
        teacher = self.config.teachers[name]
        tuned = teacher.tuned and not teacher.address
        return next(cell for cell in (self.tuned if tuned else self.base) if cell.model == teacher.model)

    def students_of(self, teacher: str) -> list[Cell]:
        """The students that need a teacher; "" for those that need none."""
        return [cell for cell in self.students if cell.teacher == teacher]

    def rationales_file(self, cell: Cell) -> str:
        """Name of the file of what the cell's teacher wrote: another teacher, data or way of writing, another file.

        The length that a student is trained with is no part of it: the trainer cuts what is longer.
        """
        content = [self.teacher_cell(cell.teacher).id, _content(self.config, cell), cell.settings["data"]["template"]]
        return f"{cell.teacher}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}.jsonl"

    def evaluation_id(self, cell: Cell) -> str:
        """Names the scoring of a cell on the study's tasks; other tasks, another name."""
        # Over all tasks and flags: what was scored otherwise must not stand beside it under one name.
        what = self.config.evaluation.model_dump_json(include={"tasks", "serve"})
        digest = hashlib.sha256(what.encode()).hexdigest()
        return f"{self.config.name[:_LONGEST_STUDY_NAME]}.{cell.id}.{digest[:8]}"

    def to_json(self) -> dict[str, Any]:
        """The configuration and every cell with its resolved settings, as plain values."""
        cells = {role: [asdict(cell) for cell in getattr(self, role)] for role in ("base", "tuned", "students")}
        return {"config": self.config.model_dump(mode="json"), **cells}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Study:
        """The study that `to_json` gave.

        Raises:
            ConfigurationError: it was written by a version with other keys.

        """
        cells = [tuple(Cell(**cell) for cell in values[role]) for role in ("base", "tuned", "students")]
        return cls(validate(StudyConfig, values["config"]), *cells)


def cohort(
    study: StudyConfig, cells: Iterable[Cell], inits: Mapping[str, Path], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The trainer's configuration file of some cells.

    Args:
        study: the study.
        cells: with ids.
        inits: what each starts from, by id.
        asked: the trainer's `teacher` or `teachers`; nothing if no cell needs one.

    """
    return {
        "run": study.name,
        "output": str(study.output.resolve()),
        "teacher": None,
        **asked,
        "evaluator": {"address": None, "tasks": [task.model_dump() for task in study.evaluation.tasks]},
        "concurrency": study.concurrency,
        "students": [{"id": cell.id, "init": str(inits[cell.id]), **cell.settings} for cell in cells],
    }


def resolve(study: StudyConfig) -> Study:
    """Builds every cell, lets the trainer check it, and names it.

    Raises:
        ConfigurationError: a service refuses a setting; its own words say which and why.

    """
    _check_servers(study)
    base, tuned, students = base_cells(study), tuning_cells(study), student_cells(study)
    drafts = [*base, *tuned, *students]
    resolved = _settings_of(study, drafts)
    for cell in drafts:
        settings = resolved[id(cell)]
        # A finished training is known by the step of its last checkpoint.
        if settings and (settings["epochs"] or (settings["best"] or {}).get("patience")):
            raise ConfigurationError(
                f"{cell.role} {cell.model} {cell.method} would end by epochs or patience; a study must know its last "
                "step: give `steps`, with `epochs: null` where a preset has epochs",
                "settings.steps",
            )
    # A cell's id has in it the id of what it starts from and of its teacher, so these are named first.
    names: dict[int, Cell] = {}
    starts: dict[str, str] = {}
    for cell in base:
        named = cell.named(resolved[id(cell)], study.models[cell.model].path, _content(study, cell))
        names[id(cell)], starts[cell.model] = named, named.id if cell.settings else named.start
    for cell in tuned:
        names[id(cell)] = cell.named(resolved[id(cell)], starts[cell.model], _content(study, cell))
    done = Study(study, tuple(names[id(cell)] for cell in base), tuple(names[id(cell)] for cell in tuned), ())
    students_by_key: dict[CellKey, Cell] = {}
    methods = all_methods(study)
    for cell in students:
        besides = _content(study, cell) | {"teacher": done.teacher_id(cell.teacher)}
        if cell.ends_by != "steps" and study.budget:
            besides |= {cell.ends_by: study.budget.amount}
        first, at = start_key(methods, cell), (cell.teacher, cell.temperature, cell.noise, cell.model, cell.seed)
        start = starts[cell.model] if first is None else students_by_key[first].id
        compared = (
            students_by_key[key_of(methods, cell.control_of, at)].id
            if cell.control_of and cell.method.endswith(f".{SAME_TOKENS}")
            else ""
        )
        students_by_key[key_of(methods, cell.method, at)] = cell.named(resolved[id(cell)], start, besides, compared)
    complete = Study(study, done.base, done.tuned, tuple(students_by_key.values()))
    _check_comparisons(complete)
    return complete


def check_inputs(study: Study) -> None:
    """Looks at what a study starts from, before a service of it is started.

    Raises:
        TutelageError: a model or a data file is not there, or cannot be read; named by its setting.

    """
    for name in sorted({cell.model for cell in study.cells}):
        field = f"models.{name}.path"
        check_model(local_model(Path(study.config.models[name].path), field), field)
    for name, teacher in study.config.teachers.items():
        check_access(teacher, f"teachers.{name}")
    check_access(study.config.evaluation, "evaluation")
    files = {"data": study.config.data}
    for field in ("base", "tuning"):
        training = getattr(study.config, field)
        if training is not None:
            files[f"{field}.data"] = training.data
    files |= {f"methods.{cell.method}.data": path for cell in study.students for path in cell.data_paths}
    for field, path in files.items():
        try:
            found = next(read_rows(path), None)
        except DataError as error:
            raise DataError(error.message, field) from error
        if found is None:
            raise DataError(f"{path} holds no rows", field)


def last_run(folder: Folder) -> Study:
    """The study that was last run in a folder, as it was resolved then.

    Raises:
        ConfigurationError: none has run there, or a version with other keys wrote it.

    """
    try:
        return Study.from_json(json.loads(folder.path("plan.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigurationError(f"no study has run in {folder.root}; give a study file", "file") from error


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
    students = [{"id": f"cell-{index}", "init": ".", **cell.settings} for index, cell in enumerate(trained)]
    # The address is asked for by the trainer's own checks; a dry run connects to nothing.
    content = {"run": study.name, "teacher": {"address": _UNNAMED_TEACHER}, "students": students}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        filled = _dry_run("trainer", [*tutelage("train"), "--config", file.name], "settings")["students"]
    settings: dict[int, Settings] = {id(cell): {} for cell in drafts}
    return settings | {id(cell): given for cell, given in zip(trained, filled, strict=True)}


def _check_servers(study: StudyConfig) -> None:
    """Lets teacher server and evaluator check their flags now, and not hours later when they are started."""
    checked: list[dict[str, Any]] = []
    for name, teacher in study.teachers.items():
        if teacher.serve and teacher.serve not in checked:
            command = [*tutelage("teacher", "serve"), *flags({"model": "."}), *flags(teacher.serve)]
            _check_listening(_dry_run("teacher", command, f"teachers.{name}.serve"), f"teachers.{name}.serve")
            checked.append(teacher.serve)
    if study.evaluation.address is None:
        command = [*tutelage("evaluate", "serve"), *flags(study.evaluation.serve)]
        _check_listening(_dry_run("evaluator", command, "evaluation.serve"), "evaluation.serve")


def _check_listening(filled: Mapping[str, Any], field: str) -> None:
    """Refuses a server that would listen beyond loopback in plaintext, and one whose files cannot be read."""
    tls = validate(ServerTls, filled["tls"]) if filled["tls"] else None
    tokens = Path(filled["token_file"]) if filled["token_file"] else None
    try:
        check_server(filled["host"], insecure=filled["insecure"], tls=tls, token_file=tokens, address_file=None)
    except ConfigurationError as error:
        raise ConfigurationError(error.message, f"{field}.{error.field}") from error


def _dry_run(service: str, command: list[str], field: str) -> dict[str, Any]:
    """The configuration that a service's command would run with.

    Raises:
        ConfigurationError: the service refuses it, in its own words.

    """
    # Not --dry-run: a cell starts from what another one has yet to train, and learns from what is yet to be written.
    ran = subprocess.run([*command, "--print-config"], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ConfigurationError(f"the {service} refuses this study: {ran.stderr.strip()}", field)
    filled: dict[str, Any] = yaml.safe_load(ran.stdout)
    return filled


def _content(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    """What decides a cell's data: the file's content (its name while it is not there), and how a teacher wrote."""
    if not cell.settings:
        return {}
    several = bool(cell.settings["data"].get("sources"))
    prints = [_fingerprint(path) for path in cell.data_paths]
    content: dict[str, Any] = {"data": prints[0]}
    if several:
        how = [{key: value for key, value in source.items() if key != "path"} for source in sources(cell.settings)]
        content = {"data": list(zip(prints, how, strict=True))}
    return content | ({"rationales": study.rationales.model_dump()} if cell.rationales else {})


def _fingerprint(path: Path) -> str:
    """SHA-256 of a data file's content; its name while it is not there."""
    try:
        file = local_file(path)
    except DataError:  # the hub does not answer; what needs the data will say why
        file = path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(path)
