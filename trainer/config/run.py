"""The configuration of `tutelage train`: one teacher, and students that share defaults.

A student's settings are those of `defaults` with its own laid over them, as `tutelage.config.overlay` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tutelage.config import Config, overlay, validate
from tutelage.data.merging import whole_model
from tutelage.errors import ConfigurationError
from tutelage.names import check_name
from tutelage.trainer.config import other_names
from tutelage.trainer.config.objective import Positive
from tutelage.trainer.config.presets import with_presets
from tutelage.trainer.config.services import EvaluatorConfig, RayConfig, TeacherConfig
from tutelage.trainer.config.student import StartConfig, StudentConfig, StudentDefaults


class CohortConfig(Config):
    """Trains students of one served teacher, each in its own Ray actor.

    Short ways, of every student and whatever the file says: --steps N, --lr RATE, and --students ID,ID to train these
    only. --submit ADDRESS runs all of it as one job of the Ray dashboard there (--submit-token FILE).
    """

    ELSEWHERE: ClassVar[dict[str, str]] = other_names.COHORT
    COMMON: ClassVar[tuple[str, ...]] = (
        "run",
        "output",
        "teacher.address",
        "defaults.init",
        "defaults.data.path",
        "defaults.data.template",
        "defaults.objective.name",
        "defaults.objective.temperature",
        "defaults.objective.on_policy_fraction",
        "defaults.steps",
        "defaults.optimizer.learning_rate",
        "defaults.batch.sequences",
        "defaults.batch.max_tokens",
        "defaults.sampling.max_new_tokens",
        "defaults.seed",
        "defaults.gpus",
        "concurrency",
        "evaluator.address",
    )

    run: str = "run"
    """Name of the run: 1 to 64 of a-z 0-9 . _ -"""
    output: Path = Path("runs/run")
    """Folder of the run; each student writes below students/<id>."""
    teacher: TeacherConfig | None = TeacherConfig()
    """Where the teacher is; none only if no objective needs one."""
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name; each row says by the field `teacher` which one it is asked of. Rows without one are
    asked of `teacher`, which is then nobody unless it is given."""
    signals_from: Path | None = None
    """Folder of a signal store: students learn from what is stored there, and no teacher is asked."""
    evaluator: EvaluatorConfig | None = None
    """Where checkpoints are scored; none means nowhere."""
    ray: RayConfig = RayConfig()
    """The cluster."""
    concurrency: Positive | None = None
    """Students that run at once; none means all."""
    defaults: StudentDefaults = StudentDefaults()
    """Settings of every student that does not say otherwise."""
    students: tuple[StudentConfig, ...] = ()
    """The students."""

    @model_validator(mode="before")
    @classmethod
    def _merge_defaults(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("teachers"):
            values = {"teacher": None, **values}
        if not isinstance(values, Mapping) or not isinstance(values.get("defaults"), Mapping):
            return values
        students = [
            overlay(with_presets(values["defaults"]), with_presets(student))
            if isinstance(student, Mapping)
            else student
            for student in values.get("students") or ()
        ]
        return {**values, "students": students}

    @field_validator("run")
    @classmethod
    def _check_run(cls, value: str) -> str:
        return check_name(value, "run")

    @field_validator("teachers")
    @classmethod
    def _check_teachers(cls, value: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
        for name in value:
            check_name(name, "teachers")
        return value

    @model_validator(mode="after")
    def _check_students(self) -> CohortConfig:
        ids = [student.id for student in self.students]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        if repeated:
            raise ConfigurationError(f"ids must differ; {', '.join(repeated)} occurs twice", "students")
        writers = {
            f"{student.id}-writer-{number}": student.id
            for student in self.students
            if student.sampling.writers is not None
            for number in range(student.sampling.writers.count)
        }
        named = next((name for name in ids if name in writers), None)
        if named is not None:
            raise ConfigurationError(f"{named} is the name of a writer of {writers[named]}; choose another", "students")
        if self.signals_from is not None and self.teachers:
            raise ConfigurationError(
                "a store has the states of one teacher, and there are several; train with the teachers", "signals_from"
            )
        self._check_starts()
        for student in self.students:
            if self.signals_from is not None and student.objective.on_policy_fraction > 0:
                raise ConfigurationError(
                    f"{student.id} writes sequences of its own, which no store holds; set its "
                    "objective.on_policy_fraction to 0, or train it with a teacher",
                    "signals_from",
                )
            no_teacher = self.teacher is None and not self.teachers and self.signals_from is None
            if no_teacher and student.objective.needs_teacher:
                raise ConfigurationError(
                    f"{student.id} learns by {student.objective.label}, which needs one; give its address", "teacher"
                )
            if self.evaluator and self.evaluator.every_steps % student.save_every_steps:
                raise ConfigurationError(
                    f"{self.evaluator.every_steps} is no multiple of save_every_steps {student.save_every_steps} of "
                    f"{student.id}; only saved checkpoints can be scored",
                    "evaluator.every_steps",
                )
        return self

    def _check_starts(self) -> None:
        starts = {
            student.id: student.init.student for student in self.students if isinstance(student.init, StartConfig)
        }
        for name in starts:
            seen = [name]
            while seen[-1] in starts:
                following = starts[seen[-1]]
                if following not in [student.id for student in self.students]:
                    raise ConfigurationError(
                        f"{seen[-1]} starts from {following}, which is no student of this run; train it as well, or "
                        "give the folder of its checkpoint",
                        "students.init",
                    )
                if following in seen:
                    raise ConfigurationError(
                        f"{' starts from '.join([*seen, following])}, so none is first; give one a folder",
                        "students.init",
                    )
                seen.append(following)

    def root(self, student: StudentConfig) -> Path:
        """The model that a student comes from, through whatever students it starts from: whose tokenizer it has."""
        while isinstance(student.init, StartConfig):
            student = self.student(student.init.student)
        return student.init

    def started(self, student: StudentConfig) -> StudentConfig:
        """A student that starts from another one with that one's checkpoint as its `init`, or as it is before that."""
        if not isinstance(student.init, StartConfig):
            return student
        first = self.folder(student.init.student)
        outcome = first / "outcome.json"
        if not outcome.exists():
            return student
        step = json.loads(outcome.read_text(encoding="utf-8"))["step"]
        checkpoints = first / "checkpoints"
        best = checkpoints / "best"
        # Not the link itself: what a training began with is to have one name.
        checkpoint = checkpoints / (best.readlink() if best.is_symlink() else f"step-{step:08d}")
        return student.model_copy(update={"init": whole_model(checkpoint)})

    def with_start_of(self, student_id: str) -> CohortConfig:
        """The cohort with `started` of one student, for its process."""
        students = [self.started(each) if each.id == student_id else each for each in self.students]
        return self.model_copy(update={"students": tuple(students)})

    def student(self, student_id: str) -> StudentConfig:
        """The student of that id.

        Raises:
            ConfigurationError: there is none.

        """
        for student in self.students:
            if student.id == student_id:
                return student
        raise ConfigurationError(f"{student_id!r} is none of {[student.id for student in self.students]}", "students")

    def for_every_student(
        self, *, steps: int | None = None, learning_rate: float | None = None, only: Sequence[str] | None = None
    ) -> CohortConfig:
        """The cohort with settings laid over every student's own.

        Args:
            steps: optimizer steps, in place of epochs as well; none leaves both.
            learning_rate: peak; none leaves it.
            only: ids of the students to keep, in their order; none keeps all.

        Raises:
            ConfigurationError: there is no student of such an id, or a value is not allowed.

        """
        own: dict[str, Any] = {} if steps is None else {"steps": steps, "epochs": None}
        if learning_rate is not None:
            own["optimizer"] = {"learning_rate": learning_rate}
        kept = self.students if only is None else tuple(self.student(student_id) for student_id in only)
        students = [overlay(student.model_dump(), own) for student in kept]
        return validate(CohortConfig, self.model_dump() | {"students": students})

    def folder(self, student_id: str) -> Path:
        """The folder that the student writes."""
        return self.output / "students" / student_id
