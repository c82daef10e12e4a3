"""The cells of a study: every training that it consists of, named by what decides its result.

A cell's id ends in a hash of its settings as the trainer resolves them, of its data's content, and of what it starts
from. So a finished cell is found again, and a changed setting is a new cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tutelage.config import overlay
from tutelage.errors import ConfigurationError
from tutelage.study.config import (
    WITHOUT_TEACHER,
    BudgetConfig,
    EndsBy,
    MethodConfig,
    Settings,
    StudyConfig,
    TrainingConfig,
)
from tutelage.study.controls import SAME_TOKENS, all_methods

Role = Literal["base", "tuned", "student"]
_NAME_CHARACTERS, _HASH_CHARACTERS = 50, 8
# The data's content and the start are hashed in their place, so that a moved folder is not another study.
_PLACES = ("id", "init", "data")
"""Settings that say where something is, not what."""


@dataclass(frozen=True)
class Cell:
    """One training; `id` is empty until its settings are resolved."""

    role: Role
    model: str
    seed: int
    settings: Settings = field(hash=False)
    """The trainer's keys, `id` and `init` left out; empty if the model is taken as it is."""
    method: str = ""
    teacher: str = ""
    temperature: float = 1.0
    noise: float = 0.0
    rationales: bool = False
    asks_teacher: bool = False
    id: str = ""
    start: str = ""
    """What it starts from: the path of a model, or the id of the cell that trains it first."""
    control_of: str = ""
    """The method that it is a control of."""
    ends_by: EndsBy = "steps"
    """What ends it: its steps, or how many tokens it has spent."""
    as_long_as: str = ""
    """Id of the cell that says how many tokens it is scored on; "" if the study's budget does."""

    @property
    def data_paths(self) -> list[Path]:
        """The data sets that it reads."""
        return [Path(source["path"]) for source in sources(self.settings)]

    @property
    def steps(self) -> int:
        """Optimizer steps, if these end it; known when the settings are resolved."""
        return int(self.settings.get("steps", 0))

    @property
    def objective(self) -> str:
        """Name of the trainer's objective; empty if the model is taken as it is."""
        return str(self.settings["objective"]["name"]) if self.settings else ""

    def named(self, resolved: Settings, start: str, besides: Mapping[str, Any], as_long_as: str = "") -> Cell:
        """The cell with its resolved settings and its id.

        Args:
            resolved: every setting of the trainer; empty if the model is taken as it is.
            start: see `start`.
            besides: whatever else decides the result: content of the data, the teacher.
            as_long_as: see `as_long_as`.

        """
        content = {key: value for key, value in resolved.items() if key not in _PLACES}
        content |= {"start": start, "template": resolved.get("data", {}).get("template"), **besides}
        content |= {"as_long_as": as_long_as} if as_long_as else {}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        parts = [self.model if self.role == "student" else f"{self.role}-{self.model}", self.method, self.teacher]
        if self.asks_teacher:
            parts += [f"t{self.temperature:g}", f"n{self.noise:g}" if self.noise else ""]
        # Names of students have 64 characters at most (tutelage.names), and the hash must not be what is cut off.
        name = "-".join([part for part in (*parts, f"s{self.seed}") if part])[:_NAME_CHARACTERS]
        settings = {key: value for key, value in resolved.items() if key not in ("id", "init")}
        return replace(
            self, settings=settings, id=f"{name}-{digest[:_HASH_CHARACTERS]}", start=start, as_long_as=as_long_as
        )


def base_cells(study: StudyConfig) -> list[Cell]:
    """Every model before it learns anything of the domain: trained on `base`, or as it is."""
    if study.base is None:
        return [Cell("base", model, study.seeds[0], {}) for model in used_models(study)]
    return [_training_cell("base", study, study.base, model) for model in used_models(study)]


def tuning_cells(study: StudyConfig) -> list[Cell]:
    """The teachers' own fine-tunings."""
    tuned = [each.model for each in study.teachers.values() if each.model and each.tuned and not each.address]
    return [_training_cell("tuned", study, study.tuning, model) for model in dict.fromkeys(tuned) if study.tuning]


def student_cells(study: StudyConfig) -> list[Cell]:
    """The grid, each cell after the one that it starts from; one cell that several blocks name is there once."""
    cells: dict[CellKey, Cell] = {}
    methods = all_methods(study)
    for block in study.grid:
        teachers = block.teachers or list(study.teachers)[:1] or [""]
        students = block.students or study.students
        for method, teacher, temperature, noise, student, seed in product(
            block.methods, teachers, block.temperatures, block.noises, students, study.seeds
        ):
            controls = [f"{method}.{control}" for control in study.methods[method].controls]
            for name in (method, *controls):
                _add(cells, study, methods, name, (teacher, temperature, noise, student, seed))
    return list(cells.values())


Setting = tuple[str, float, float, str, int]
"""Teacher, temperature, noise, student, seed."""
CellKey = tuple[str, Setting]
"""Of a cell among the students: its method and what of the grid it depends on."""


def _add(
    cells: dict[CellKey, Cell], study: StudyConfig, methods: Mapping[str, MethodConfig], name: str, at: Setting
) -> None:
    """Adds a cell of the grid, and before it the one that it starts from."""
    key = key_of(methods, name, at)
    if key in cells:
        return
    own, (_, (teacher, temperature, noise, student, seed)) = methods[name], key
    if own.init is not None:
        _add(cells, study, methods, own.init.method, _at_start(at))
    objective = own.objective | ({"temperature": temperature, "noise": noise} if own.asks_teacher else {})
    data: Any = {"path": str(study.data)} if isinstance(own.data, str) else own.data
    data = {"sources": data} if isinstance(data, list) else data
    settings = overlay(overlay(study.settings, {"objective": objective, "data": data, "seed": seed}), own.settings)
    ends_by: EndsBy = "scored_tokens" if name.endswith(f".{SAME_TOKENS}") else "steps"
    if study.budget is not None and ends_by == "steps":
        ends_by = _ends_by(study.budget, methods, name)
        if study.budget.unit == ends_by == "steps":
            settings = _with_steps(study.budget.amount, methods, name, settings)
    cells[key] = Cell(
        "student",
        student,
        seed,
        settings,
        method=name,
        teacher=teacher,
        temperature=temperature,
        noise=noise,
        rationales=own.data == "rationales",
        asks_teacher=own.asks_teacher,
        control_of=control_of(study, name),
        ends_by=ends_by,
    )


def key_of(methods: Mapping[str, MethodConfig], name: str, at: Setting) -> CellKey:
    """The key of the cell of a method at a place of the grid, without what it does not depend on."""
    teacher, temperature, noise, student, seed = at
    # Fine-tuning for as long as another cell is another one for each of those.
    as_long_as = name.endswith(f".{SAME_TOKENS}")
    if not methods[name].asks_teacher and not as_long_as:
        temperature, noise = 1.0, 0.0
    return name, (teacher if as_long_as or _has_teacher(methods, name) else "", temperature, noise, student, seed)


def start_key(methods: Mapping[str, MethodConfig], cell: Cell) -> CellKey | None:
    """The key of the cell that a student starts from; None if it starts from the base model."""
    init = methods[cell.method].init
    at = (cell.teacher, cell.temperature, cell.noise, cell.model, cell.seed)
    return None if init is None else key_of(methods, init.method, _at_start(at))


def _at_start(at: Setting) -> Setting:
    teacher, _, _, student, seed = at
    return teacher, 1.0, 0.0, student, seed


def _has_teacher(methods: Mapping[str, MethodConfig], name: str) -> bool:
    """Whether a method, or one that it starts from, learns from a teacher."""
    init = methods[name].init
    return methods[name].needs_teacher or (init is not None and _has_teacher(methods, init.method))


def control_of(study: StudyConfig, name: str) -> str:
    """The method that one is a control of; "" if it is none's."""
    return "" if name in study.methods else name.rpartition(".")[0]


def _ends_by(budget: BudgetConfig, methods: Mapping[str, MethodConfig], name: str) -> EndsBy:
    """What ends a method under a budget.

    Raises:
        ConfigurationError: it has steps of its own, and none starts from it.

    """
    own = methods[name].settings.get("steps")
    if own is not None and not any(each.init is not None and each.init.method == name for each in methods.values()):
        raise ConfigurationError(
            f"{own}, but every method spends the budget ({budget.amount} {budget.unit}), unless another one starts "
            "from it; leave it out, or leave `budget` out",
            f"methods.{name}.settings.steps",
        )
    if own is not None or (budget.unit == "teacher_tokens" and not methods[name].asks_teacher):
        return "steps"
    return budget.unit


def _with_steps(budget: int, methods: Mapping[str, MethodConfig], name: str, settings: Settings) -> Settings:
    """Settings with the steps that the budget leaves a method, the warm-up's taken off.

    Raises:
        ConfigurationError: nothing is left.

    """
    if "steps" in methods[name].settings:
        return settings
    before = _steps_before(budget, methods, name)
    if before >= budget:
        raise ConfigurationError(
            f"what {name} starts from takes {before} of the budget's {budget} steps; give that one fewer",
            f"methods.{name}.init",
        )
    return overlay(settings, {"steps": budget - before})


def _steps_before(budget: int, methods: Mapping[str, MethodConfig], name: str) -> int:
    """Steps of what a method starts from, all the way back to the base model."""
    init = methods[name].init
    if init is None:
        return 0
    before = _steps_before(budget, methods, init.method)
    return before + int(methods[init.method].settings.get("steps", budget - before))


def sources(settings: Settings) -> list[Settings]:
    """The data sets of a student's settings, each as the trainer has it."""
    data = settings["data"]
    return list(data.get("sources") or ()) or [data]


def used_models(study: StudyConfig) -> list[str]:
    """Teachers' models, then students, each once."""
    taught = [teacher.model for teacher in study.teachers.values() if teacher.model]
    return list(dict.fromkeys([*taught, *study.students]))


def _training_cell(role: Role, study: StudyConfig, training: TrainingConfig, model: str) -> Cell:
    own = {"objective": {"name": WITHOUT_TEACHER}, "data": {"path": str(training.data)}, "seed": study.seeds[0]}
    settings = overlay(overlay(study.settings, own), training.settings)
    return Cell(role, model, int(settings["seed"]), settings)
