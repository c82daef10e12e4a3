"""The configuration of `tutelage train`: one teacher, and students that share defaults.

A student's settings are those of `defaults` with its own laid over them, key by key; only an `objective`
of another name replaces the default one whole, since the parameters of one mean nothing to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from tutelage.configuration import Config
from tutelage.errors import ConfigurationError
from tutelage.names import check_name
from tutelage.tls import ClientTls

from trainer.objectives.table import (
    OBJECTIVES,
    Objective,
    Setting,
    SignalKind,
    check_signal,
    objective_named,
    resolve_parameters,
)

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PARAMETERS = ("beta", "normalize_beta", "alpha", "head_mass", "estimator")
"""Fields of `ObjectiveConfig` that are parameters of single objectives in the table."""
_FRACTION_OF_DATA = {"student and data set": 0.5, "student": 1.0}


class TeacherConfig(Config):
    """Where the teacher is."""

    address: str = "127.0.0.1:50051"
    """host:port of the teacher server."""
    wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long to wait for a teacher that does not answer before giving up."""
    tls: ClientTls | None = None
    """How to know the teacher; none means an unencrypted connection."""
    token_file: Path | None = None
    """File with the bearer token that the teacher asks for."""


class TaskConfig(Config):
    """One task that the evaluator is asked for."""

    task: str
    """Name of the task, as the evaluator lists it."""
    protocol: Literal["paper", "loglik", "open"] = "paper"
    """How it is scored."""
    limit: NotNegative = 0
    """Items to score, the first ones; 0 means all."""


class EvaluatorConfig(Config):
    """Where the evaluator is and what it is asked for."""

    address: str = "127.0.0.1:50052"
    """host:port of the evaluator."""
    tls: ClientTls | None = None
    """How to know the evaluator; none means an unencrypted connection."""
    token_file: Path | None = None
    """File with the bearer token that the evaluator asks for."""
    tasks: tuple[TaskConfig, ...]
    """Tasks for each evaluated checkpoint."""
    every_steps: NotNegative = 0
    """Evaluate every so many steps besides before and after training; must be saved steps; 0 means not."""


class RayConfig(Config):
    """The cluster that the students run on."""

    address: str | None = None
    """Address of a running cluster; none starts a local one and stops it afterwards."""
    cpus: Positive | None = None
    """CPUs of the local cluster; none means what the students that run at once ask for."""
    dashboard: bool = False
    """Whether the local cluster serves the Ray dashboard (on loopback)."""
    object_store_bytes: Positive = 80 * 2**20
    """Shared memory of the local cluster; students keep nothing in it."""
    max_restarts: NotNegative = 10
    """How often Ray restarts a student whose process died."""


class DataConfig(Config):
    """What a student reads."""

    path: Path
    """A .jsonl, .json or .parquet file of `prompt`(+`completion`), `messages`,
    `instruction`(+`input`, `output`) or `question`(+`answer`) rows."""
    template: Literal["chat", "alpaca", "plain"] = "chat"
    """The tokenizer's chat template, LLM-Adapters' prompt, or the prompt as it is."""


class ObjectiveConfig(Config):
    """What a student minimises, and what of the teacher it sees for that."""

    name: str = "gkd"
    """A name of the table of objectives (trainer/objectives/table.py)."""
    beta: float | None = None
    """`gkd`: 0 is forward KL, 1 is reverse KL; left out, 0.5."""
    normalize_beta: bool | None = None
    """`gkd`: divide by beta · (1 - beta), which removes the jump in scale at both ends."""
    alpha: float | None = None
    """`skew_kl` and `skew_reverse_kl`: share of the other distribution in the mixture; left out, 0.1."""
    head_mass: float | None = None
    """`adaptive_kl`: mass of the teacher's head; left out, 0.5."""
    estimator: str | None = None
    """`policy_gradient_kl`: policy_gradient, k2_reverse_kl or k3_forward_kl."""
    on_policy_fraction: Fraction | None = None
    """λ: probability, drawn for each sequence, that the student writes it itself. Left out, it is 0.5 for
    objectives on both kinds of data, 1 for those on the student's own and 0 for the others."""
    signal: SignalKind | None = None
    """What the teacher sends; left out, the first kind that serves the objective exactly."""
    k: Positive = 64
    """`topk` and `candidates`: ids per position; with `min_mass`, at most."""
    min_mass: Fraction = 0.0
    """`topk`: if above 0, keep at each position the fewest ids that have this mass at `temperature`."""
    temperature: Temperature = 1.0
    """Divides both models' logits."""
    student_temperature: Temperature | None = None
    """Divides the student's logits instead of `temperature`."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Standard deviation of the normal noise on the teacher's logits, before the temperature."""
    teacher_top_k: NotNegative = 0
    """Keep only the teacher's k likeliest ids; 0 keeps all."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep only the teacher's likeliest ids that have this mass together."""
    scale_by_temperature_squared: bool = False
    """Multiply the loss by temperature² (Hinton et al. 2015)."""
    approximate: bool = False
    """Accept a signal that serves the objective only approximately; written into all metadata."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_table(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        entry = OBJECTIVES.get(filled.get("name", "gkd"))
        if entry is not None:
            defaults = {"on_policy_fraction": _FRACTION_OF_DATA.get(entry.data, 0.0), "signal": entry.default_kind}
            filled |= {key: value for key, value in defaults.items() if filled.get(key) is None}
        return filled

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        entry = objective_named(self.name)
        resolve_parameters(self.name, self.parameters)
        if self.signal is not None:
            check_signal(
                self.name,
                self.signal,
                parameters=self.parameters,
                noise=self.noise,
                truncates=self.teacher_top_k > 0 or self.teacher_top_p < 1,
                approximate=self.approximate,
            )
        _check_fraction(entry, self.own_fraction)
        if self.min_mass > 0 and self.signal != "topk":
            raise ConfigurationError(f"only topk keeps ids by mass, not {self.signal}", "objective.min_mass")
        return self

    @property
    def parameters(self) -> dict[str, Setting]:
        """The objective's parameters that were given."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def own_fraction(self) -> float:
        """λ; filled by the time that a configuration exists."""
        assert self.on_policy_fraction is not None
        return self.on_policy_fraction


def _check_fraction(entry: Objective, fraction: float) -> None:
    if fraction > 0 and not entry.needs_teacher:
        raise ConfigurationError(
            f"{entry.name} learns from the targets of its data, so it must be 0 (given {fraction})",
            "objective.on_policy_fraction",
        )
    if fraction < 1 and entry.sampled_token:
        raise ConfigurationError(
            f"{entry.name} is defined on the student's own tokens, so it must be 1 (given {fraction})",
            "objective.on_policy_fraction",
        )


class SamplingConfig(Config):
    """How a student writes its own sequences."""

    max_new_tokens: Positive = 128
    """Tokens to write at most; `batch.max_tokens` limits prompt and continuation together."""
    temperature: Temperature = 1.0
    """Sampling temperature; has nothing to do with the objective's."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the samples are not the student's own distribution."""


class OptimizerConfig(Config):
    """AdamW and its learning rate."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak."""
    warmup_steps: NotNegative = 2
    """Steps of linear rise from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up; `linear` and `cosine` end at 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the two moments."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of a step."""


class BatchConfig(Config):
    """What one optimizer step sees."""

    sequences: Positive = 8
    """Sequences of a step; the loss is the mean over all their unmasked tokens."""
    micro_batch_sequences: Positive = 8
    """Sequences that go through the student at once; changes memory, not the loss."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest sequence, prompt and completion together."""


class HeldOutConfig(Config):
    """Sequences that are never trained on, on which the divergence from the teacher is measured."""

    sequences: NotNegative = 16
    """How many; 0 measures nothing."""
    every_steps: Positive = 10
    """Measured before training, every so many steps, and at the end."""


class StudentSettings(Config):
    """What students may share."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """What it minimises."""
    sampling: SamplingConfig = SamplingConfig()
    """How it writes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it steps."""
    batch: BatchConfig = BatchConfig()
    """What a step sees."""
    held_out: HeldOutConfig = HeldOutConfig()
    """On what its distance to the teacher is measured."""
    steps: Positive = 100
    """Optimizer steps."""
    seed: NotNegative = 0
    """Of data order, sampling and noise. Held-out sequences and data order do not depend on the id, so
    students of one seed see the same."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of forward and backward; the optimizer always keeps float32 weights."""
    threads: Positive = 1
    """CPU threads of its process, and the CPUs that Ray reserves for it."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for it."""
    loss_on_prompt: bool = False
    """Whether prompt tokens count as well."""
    save_every_steps: Positive = 10
    """Steps between checkpoints; a crash costs at most so many."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep, besides those sent to the evaluator."""


class StudentDefaults(StudentSettings):
    """Settings of every student that does not say otherwise."""

    init: Path | None = None
    """Hugging Face directory to start from."""
    data: DataConfig | None = None
    """What they read."""


class StudentConfig(StudentSettings):
    """One student."""

    id: str
    """Its name, unique in the run: 1 to 64 of a-z 0-9 . _ -"""
    init: Path
    """Hugging Face directory to start from."""
    data: DataConfig
    """What it reads."""

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        return check_name(value, "id")


class CohortConfig(Config):
    """Trains students of one served teacher, each in its own Ray actor."""

    run: str = "run"
    """Name of the run: 1 to 64 of a-z 0-9 . _ -"""
    output: Path = Path("runs/run")
    """Folder of the run; each student writes below students/<id>."""
    teacher: TeacherConfig | None = TeacherConfig()
    """Where the teacher is; none only if no objective needs one."""
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
        if not isinstance(values, Mapping) or not isinstance(values.get("defaults"), Mapping):
            return values
        students = [
            _merged(values["defaults"], student) if isinstance(student, Mapping) else student
            for student in values.get("students") or ()
        ]
        return {**values, "students": students}

    @field_validator("run")
    @classmethod
    def _check_run(cls, value: str) -> str:
        return check_name(value, "run")

    @model_validator(mode="after")
    def _check_students(self) -> CohortConfig:
        ids = [student.id for student in self.students]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        if repeated:
            raise ConfigurationError(f"ids must differ; {', '.join(repeated)} occurs twice", "students")
        for student in self.students:
            if self.signals_from is not None and student.objective.own_fraction > 0:
                raise ConfigurationError(
                    f"{student.id} writes sequences of its own, which no store holds; set its "
                    "objective.on_policy_fraction to 0, or train it with a teacher",
                    "signals_from",
                )
            no_teacher = self.teacher is None and self.signals_from is None
            if no_teacher and objective_named(student.objective.name).needs_teacher:
                raise ConfigurationError(
                    f"{student.id} learns by {student.objective.name}, which needs one; give its address", "teacher"
                )
            if self.evaluator and self.evaluator.every_steps % student.save_every_steps:
                raise ConfigurationError(
                    f"{self.evaluator.every_steps} is no multiple of save_every_steps {student.save_every_steps} of "
                    f"{student.id}; only saved checkpoints can be scored",
                    "evaluator.every_steps",
                )
        return self

    def student(self, student_id: str) -> StudentConfig:
        """The student of that id.

        Raises:
            ConfigurationError: there is none.

        """
        for student in self.students:
            if student.id == student_id:
                return student
        raise ConfigurationError(f"{student_id!r} is none of {[student.id for student in self.students]}", "students")

    def folder(self, student_id: str) -> Path:
        """The folder that the student writes."""
        return self.output / "students" / student_id


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `defaults`, key by key; see the head of this module for `objective`."""
    merged = {key: value for key, value in defaults.items() if value is not None}
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        replaces = key == "objective" and both and value.get("name") not in (None, merged[key].get("name"))
        merged[key] = _merged(merged[key], value) if both and not replaces else value
    return merged
