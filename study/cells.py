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
from typing import Any, Literal

from tutelage.config import overlay
from tutelage.study.config import WITHOUT_TEACHER, Settings, StudyConfig, TrainingConfig

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

    @property
    def steps(self) -> int:
        """Optimizer steps; known when the settings are resolved."""
        return int(self.settings.get("steps", 0))

    @property
    def objective(self) -> str:
        """Name of the trainer's objective; empty if the model is taken as it is."""
        return str(self.settings["objective"]["name"]) if self.settings else ""

    def named(self, resolved: Settings, start: str, besides: Mapping[str, Any]) -> Cell:
        """The cell with its resolved settings and its id.

        Args:
            resolved: every setting of the trainer; empty if the model is taken as it is.
            start: see `start`.
            besides: whatever else decides the result: content of the data, the teacher.

        """
        content = {key: value for key, value in resolved.items() if key not in _PLACES}
        content |= {"start": start, "template": resolved.get("data", {}).get("template"), **besides}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        parts = [self.model if self.role == "student" else f"{self.role}-{self.model}", self.method, self.teacher]
        if self.asks_teacher:
            parts += [f"t{self.temperature:g}", f"n{self.noise:g}" if self.noise else ""]
        # Names of students have 64 characters at most (tutelage.names), and the hash must not be what is cut off.
        name = "-".join([part for part in (*parts, f"s{self.seed}") if part])[:_NAME_CHARACTERS]
        settings = {key: value for key, value in resolved.items() if key not in ("id", "init")}
        return replace(self, settings=settings, id=f"{name}-{digest[:_HASH_CHARACTERS]}", start=start)


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
    """The grid; one cell that several blocks name is there once."""
    cells: dict[tuple[Any, ...], Cell] = {}
    for block in study.grid:
        teachers = block.teachers or list(study.teachers)[:1] or [""]
        students = block.students or study.students
        for method, teacher, temperature, noise, student, seed in product(
            block.methods, teachers, block.temperatures, block.noises, students, study.seeds
        ):
            own = study.methods[method]
            if not own.asks_teacher:
                # Neither changes what is learnt from texts: the cells of a grid of temperatures are one cell.
                temperature, noise = 1.0, 0.0
            objective = own.objective | ({"temperature": temperature, "noise": noise} if own.asks_teacher else {})
            given = {"objective": objective, "data": {"path": str(study.data)}, "seed": seed}
            cell = Cell(
                "student",
                student,
                seed,
                overlay(overlay(study.settings, given), own.settings),
                method=method,
                teacher=teacher if own.needs_teacher else "",
                temperature=temperature,
                noise=noise,
                rationales=own.data == "rationales",
                asks_teacher=own.asks_teacher,
            )
            key = (cell.method, cell.teacher, cell.temperature, cell.noise, cell.model, cell.seed)
            cells.setdefault(key, cell)
    return list(cells.values())


def used_models(study: StudyConfig) -> list[str]:
    """Teachers' models, then students, each once."""
    taught = [teacher.model for teacher in study.teachers.values() if teacher.model]
    return list(dict.fromkeys([*taught, *study.students]))


def _training_cell(role: Role, study: StudyConfig, training: TrainingConfig, model: str) -> Cell:
    own = {"objective": {"name": WITHOUT_TEACHER}, "data": {"path": str(training.data)}, "seed": study.seeds[0]}
    settings = overlay(overlay(study.settings, own), training.settings)
    return Cell(role, model, int(settings["seed"]), settings)
