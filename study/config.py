"""What a study file says: models, teachers, students, methods, the grid over them, tasks, and what will be compared.

Settings of the trainer (`settings`, `objective`) are the trainer's own keys; it checks them when the study is planned.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from tutelage.config import Config
from tutelage.errors import ConfigurationError
from tutelage.names import check_address, check_name
from tutelage.rpc.tls import ClientAccess
from tutelage.tasks import TaskConfig

Positive = Annotated[int, Field(ge=1)]
Settings = dict[str, Any]
"""Keys of the trainer's student settings."""
Side = Literal["method", "teacher", "temperature", "noise"]
WITHOUT_TEACHER = "sft"
"""The objective that needs neither a teacher nor what it wrote."""
EndsBy = Literal["steps", "scored_tokens", "teacher_tokens"]
Control = Literal["shuffled", "same_tokens", "constant_advantage", "equal_teacher"]


class ModelConfig(Config):
    """A model to start from."""

    path: str
    """A Hugging Face directory, or a name on the hub."""
    parameters: Positive
    """Its trained numbers: what "size" means in the report."""
    hidden_size: Positive
    """Width of its hidden states, for the bytes that a teacher sends."""


def access_of(server: ClientAccess) -> Settings:
    """How a server is asked, as the other commands' `tls` and `token_file` have it."""
    return server.model_dump(mode="json", include={"tls", "token_file"}, exclude_none=True)


class TrainingConfig(Config):
    """A fine-tuning with targets: of base models, or of a teacher on the domain."""

    data: Path
    """Rows of prompts and completions."""
    settings: Settings = Field(default_factory=dict)
    """The trainer's keys; over the study's `settings`."""


class TeacherConfig(ClientAccess):
    """One teacher, or several that students have as one; `tls` and `token_file` are for those who ask it."""

    model: str = ""
    """Of `models`; empty for one that has `members`."""
    members: tuple[str, ...] = ()
    """Others of `teachers`, all asked by one student: each row of the data names one of them in its field `teacher`."""
    tuned: bool = True
    """Whether it is fine-tuned on the domain (`tuning`) before it teaches."""
    address: Annotated[str, AfterValidator(check_address)] | None = None
    """host:port of a teacher that is served already; none means that the study serves it."""
    serve: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Flags of `tutelage teacher serve` besides model, address, roles and store."""

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if bool(self.model) == bool(self.members):
            raise ConfigurationError("a teacher is of a model, or has members; give one of the two", "teachers")
        if self.members and (self.address or self.serve or self.tls or self.token_file):
            raise ConfigurationError("its members are served, each with its own address and flags", "teachers.members")
        if self.address and self.serve:
            raise ConfigurationError(
                "the teacher at `address` was told by who served it; leave it out", "teachers.serve"
            )
        return self


class StartConfig(Config):
    """Another method of the study to start from."""

    method: str
    """Of `methods`: the student of the same model and seed (and teacher, if it needs one) that it trained, at
    temperature 1 without noise."""


class BudgetConfig(Config):
    """What every method may spend, its warm-up included: so many steps, scored tokens or tokens that a teacher reads.

    A method that starts from another one has what that one left. One that asks no teacher spends no tokens of one, and
    ends by its `steps` under a budget of them.
    """

    steps: Positive | None = None
    """Optimizer steps."""
    scored_tokens: Positive | None = None
    """Tokens that the loss sees."""
    teacher_tokens: Positive | None = None
    """Tokens of the sequences that the teacher is asked about, prompts included."""

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if len(self._given) != 1:
            raise ConfigurationError("give one of steps, scored_tokens and teacher_tokens", "budget")
        return self

    @property
    def _given(self) -> list[EndsBy]:
        return [unit for unit in get_args(EndsBy) if getattr(self, unit) is not None]

    @property
    def unit(self) -> EndsBy:
        """Which of them it is."""
        return self._given[0]

    @property
    def amount(self) -> int:
        """How much of it."""
        return int(getattr(self, self.unit))


class MethodConfig(Config):
    """One way to train a student."""

    objective: Settings
    """The trainer's `objective`, without `temperature` and `noise`, which are the grid's."""
    init: StartConfig | None = None
    """What it starts from; none means the base model."""
    data: Literal["data", "rationales"] | Settings | list[Settings] = "data"
    """What it learns from: the study's data, the same with the teacher's own completions, or, as the trainer's `data`
    has it, another data set or a list of several, of which some may be prompts without answers."""
    settings: Settings = Field(default_factory=dict)
    """The trainer's other keys; over the study's `settings`."""
    controls: tuple[Control, ...] = ()
    """What it is to be told apart from (docs/study.md); each is a method of its own, `METHOD.CONTROL`."""

    @property
    def needs_teacher(self) -> bool:
        """False for plain fine-tuning."""
        return bool(self.objective.get("name") != WITHOUT_TEACHER)

    @property
    def asks_teacher(self) -> bool:
        """Whether a training step asks the teacher; `seq_kd` only reads what it wrote."""
        return self.needs_teacher and self.objective.get("name") != "seq_kd"


class BlockConfig(Config):
    """A block of the grid: every combination of what it names."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of `methods`."""
    students: tuple[str, ...] = ()
    """Of `students`; none means all."""
    teachers: tuple[str, ...] = ()
    """Of `teachers`; none means the first."""
    temperatures: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    """Distillation temperatures."""
    noises: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    """Standard deviations of the noise on the teacher's logits."""


class RationalesConfig(Config):
    """How a teacher writes the completions that `seq_kd` learns from."""

    max_new_tokens: Positive = 256
    """Tokens to write at most."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature; 0 is greedy."""


class EvaluationConfig(ClientAccess):
    """What is measured of each trained model; `tls` and `token_file` are for those who ask the evaluator."""

    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    """Tasks."""
    serve: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Flags of `tutelage evaluate serve` besides its port and folders."""
    address: Annotated[str, AfterValidator(check_address)] | None = None
    """host:port of an evaluator that is served already and sees the study's folder; none means that the study serves
    one."""
    frames: Path | None = None
    """Folder that the one at `address` writes its frames to."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if (self.address is None) != (self.frames is None):
            raise ConfigurationError(
                "an evaluator that is served already has an address and the folder of its frames; give both or neither",
                "evaluation",
            )
        if self.address and self.serve:
            raise ConfigurationError(
                "the evaluator at `address` was told by who served it; leave it out", "evaluation.serve"
            )
        return self


class ComparisonConfig(Config):
    """Two sets of rows to compare item by item; declared before anything is run."""

    name: str
    """For people."""
    family: str
    """Comparisons of one family share the error rate (Holm)."""
    first: dict[Side, str | float]
    """Which rows: their method, and teacher, temperature, noise where the method has several."""
    second: dict[Side, str | float]
    """Which rows they are compared with."""
    students: tuple[str, ...] = ()
    """Students that are compared; none means all."""
    tasks: tuple[str, ...] = ()
    """Of `evaluation.tasks`, as written there: what is compared and averaged; none means all."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Largest difference in points that counts as none; with it, equivalence is tested."""


class ClaimConfig(Config):
    """What is expected, declared before the run: of every comparison of a family, or of a trend."""

    text: str
    """The claim, for people."""
    family: str | None = None
    """Of `comparisons`."""
    trend: Literal["size", "agreement", "fidelity"] | None = None
    """What the improvement over fine-tuning goes with."""
    expects: Literal["first higher", "second higher", "equivalent", "negative", "positive", "none"]
    """Of a family: which side scores higher, or equivalence within the margin; of a trend: its sign."""

    @model_validator(mode="after")
    def _check(self) -> ClaimConfig:
        if (self.family is None) == (self.trend is None):
            raise ConfigurationError(f"{self.text!r} names {self.family!r} and {self.trend!r}; give one", "claims")
        allowed = ("first higher", "second higher", "equivalent") if self.family else ("negative", "positive", "none")
        if self.expects not in allowed:
            raise ConfigurationError(f"{self.expects!r} is none of {', '.join(allowed)}", "claims.expects")
        return self


class RateConfig(Config):
    """What was measured elsewhere, for a plan before anything of this study has run."""

    train_tokens_per_second: Annotated[float, Field(gt=0)]
    """Tokens a second that one student of `at_parameters` trains on, and scales with one over its parameters."""
    at_parameters: Positive
    """Size of the student that it was measured with."""
    score_tokens_per_second: Annotated[float, Field(gt=0)]
    """Tokens a second that the teacher scores."""
    write_tokens_per_second: Annotated[float, Field(gt=0)]
    """Tokens a second that the teacher, or a student, writes."""
    seconds_per_cell: Annotated[float, Field(ge=0)] = 10.0
    """Start of a student's process and evaluation."""
    source: str
    """Where the figures come from."""


class StudyConfig(Config):
    """A whole study."""

    name: str
    """Name of the study: 1 to 64 of a-z 0-9 . _ -"""
    output: Path
    """Folder of everything that it writes."""
    models: dict[str, ModelConfig]
    """Models by name."""
    base: TrainingConfig | None = None
    """What every model learns first; none means that the models are used as they are."""
    tuning: TrainingConfig | None = None
    """How a teacher is fine-tuned on the domain; none needs every teacher to be `tuned: false` or served."""
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Teachers by name, the first being the grid's default."""
    students: Annotated[tuple[str, ...], Field(min_length=1)]
    """Models that are trained as students."""
    data: Path
    """What students learn from: a file of prompts and completions."""
    rationales: RationalesConfig = RationalesConfig()
    """How teachers write for `data: rationales`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Of every cell; data order, sampling and noise depend on it."""
    settings: Settings = Field(default_factory=dict)
    """The trainer's keys, of every training of the study."""
    methods: dict[str, MethodConfig]
    """Methods by name."""
    grid: Annotated[tuple[BlockConfig, ...], Field(min_length=1)]
    """Which cells there are, besides those that their methods start from; one that several blocks name is one cell."""
    budget: BudgetConfig | None = None
    """What every method of the grid spends; none means that each says it by its `steps`. A method that another one
    starts from may have `steps` of its own in its `settings`, and ends by those."""
    evaluation: EvaluationConfig
    """What is measured."""
    comparisons: tuple[ComparisonConfig, ...] = ()
    """Primary comparisons."""
    claims: tuple[ClaimConfig, ...] = ()
    """What the comparisons and trends are about."""
    concurrency: Positive = 1
    """Students that train at once."""
    store: bool = True
    """Whether served teachers keep hidden states, so that cells over the same sequences share one pass."""
    rates: RateConfig | None = None
    """For the plan's hours while no cell has run."""

    @property
    def frames(self) -> Path:
        """Folder of the rows of its items."""
        return self.evaluation.frames or self.output / "frames"

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        for name in (self.name, *self.models, *self.teachers, *self.methods):
            check_name(name, "name")
        _require_known("students", self.students, self.models)
        for name, teacher in self.teachers.items():
            _require_known(f"teachers.{name}.model", [teacher.model] if teacher.model else [], self.models)
            alone = [other for other, each in self.teachers.items() if each.model]
            _require_known(f"teachers.{name}.members", teacher.members, alone)
            if teacher.model and teacher.tuned and teacher.address is None and self.tuning is None:
                raise ConfigurationError(
                    f"{name} is to be tuned; say how in `tuning`, or set tuned: false", f"teachers.{name}.tuned"
                )
            if teacher.address and teacher.tuned and self.tuning is not None:
                raise ConfigurationError(
                    f"{name} is served at {teacher.address} already, and so is not tuned here; set tuned: false",
                    f"teachers.{name}.tuned",
                )
        for index, block in enumerate(self.grid):
            _require_known(f"grid.{index}.methods", block.methods, self.methods)
            _require_known(f"grid.{index}.students", block.students, self.students)
            _require_known(f"grid.{index}.teachers", block.teachers, self.teachers)
            for teacher_name in block.teachers or list(self.teachers)[:1]:
                self._check_writes(teacher_name, block.methods, f"grid.{index}.methods")
            if not self.teachers and any(self.methods[name].needs_teacher for name in block.methods):
                raise ConfigurationError("a method needs a teacher and there is none; name one", f"grid.{index}")
        self._check_starts()
        for comparison in self.comparisons:
            asked = {each.task for each in self.evaluation.tasks}
            _require_known(f"comparisons.{comparison.name}.tasks", comparison.tasks, asked)
        _require_known(
            "claims.family", (c.family for c in self.claims if c.family), {c.family for c in self.comparisons}
        )
        return self

    def _check_starts(self) -> None:
        for name, method in self.methods.items():
            seen = [name]
            while method.init is not None:
                field = f"methods.{seen[-1]}.init"
                _require_known(field, [method.init.method], self.methods)
                if method.init.method in seen:
                    raise ConfigurationError(
                        f"{' starts from '.join([*seen, method.init.method])}, so none is first; let one start from "
                        "the base model",
                        field,
                    )
                seen.append(method.init.method)
                method = self.methods[seen[-1]]

    def _check_writes(self, teacher: str, methods: Iterable[str], field: str) -> None:
        writes = [name for name in methods if self.methods[name].data == "rationales"]
        _require_known(field.replace("methods", "teachers"), [teacher], self.teachers)
        if writes and self.teachers[teacher].members:
            raise ConfigurationError(
                f"{writes[0]} learns from what its teacher writes, and {teacher} is several; choose one of them", field
            )


def _require_known(field: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{name!r} is not there; choose from {', '.join(known)}", field)
