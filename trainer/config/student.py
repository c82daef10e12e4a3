"""The configuration of one student: what it learns from, how it steps, writes, is measured and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tutelage.config import Config, overlay
from tutelage.data.conversation_settings import ConversationSettings
from tutelage.data.conversations import Turns
from tutelage.data.rows import Part
from tutelage.errors import ConfigurationError
from tutelage.names import check_name
from tutelage.trainer.config import other_names
from tutelage.trainer.config.objective import Fraction, NotNegative, ObjectiveConfig, Positive, Temperature
from tutelage.trainer.config.presets import with_presets

TrackerName = Literal["tensorboard", "wandb", "trackio"]
LOWEST_VLLM_TEMPERATURE = 0.01
"""vLLM raises lower ones to this."""
HeldOutMetric = Literal[
    "heldout/cross_entropy", "heldout/forward_kl", "heldout/reverse_kl", "heldout/jsd", "heldout/top1_agreement"
]


class SourceConfig(ConversationSettings):
    """One data set, and how its rows become token ids."""

    path: Path
    """A .jsonl, .json or .parquet file of `prompt`(+`completion`), `messages`,
    `instruction`(+`input`, `output`) or `question`(+`answer`) rows; on the hub, `hf://datasets/OWNER/NAME[@REVISION]/FILE`;
    or a folder or a name on the hub (`OWNER/NAME`), which `datasets` reads."""
    configuration: str | None = None
    """Of a name on the hub: which of its configurations (`name` of `datasets.load_dataset`)."""
    split: str = "train"
    """Of a folder or a name on the hub."""
    revision: str | None = None
    """Of a name on the hub: branch, tag or, better, commit."""
    streaming: bool = False
    """Of a folder or a name on the hub: whether rows are read as they are trained on, in a seeded order within each
    window of 1,024."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of several data sets: how often an example is of this one, relative to the others."""
    chat_template: Literal["same", "student"] | Path = "same"  # type: ignore[assignment]
    """With `template: chat`: whether the teacher must have the student's chat template (`same`), or the student's is
    used although the teacher has another (`student`); or the path of a Jinja file that is used in its place."""
    turns: Turns = "all"
    """Which answers of `messages` are learned from: all, the last, or those that say `train: true` (`marked`)."""
    teacher: str | None = None
    """Name of the teacher that is asked about its rows; a row's own `teacher` comes first. None means the run's one."""

    @property
    def part(self) -> Part:
        """Which part of the data set."""
        return Part(self.configuration, self.split, self.revision, self.streaming)


class DataConfig(SourceConfig):
    """What a student reads: a data set, or several with weights, which a list of them says as well."""

    path: Path | None = None  # type: ignore[assignment]
    """As of a source; none if there are several."""
    sources: tuple[SourceConfig, ...] = ()
    """Several data sets in place of one; what the settings beside it say goes for each that does not say otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _lay_over_own(cls, values: Any) -> Any:
        if isinstance(values, list | tuple):
            values = {"sources": values}
        if not isinstance(values, Mapping) or not isinstance(values.get("sources"), list | tuple):
            return values
        own = {key: value for key, value in values.items() if key not in ("path", "sources")}
        sources = [overlay(own, each) if isinstance(each, Mapping) else each for each in values["sources"]]
        return {**values, "sources": sources}

    @model_validator(mode="after")
    def _check_one_or_several(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ConfigurationError("give either a path, or a list of sources that have one each", "data.path")
        return self


Engine = Literal["transformers", "vllm"]


class WritersConfig(Config):
    """Processes that write in a student's place, each with a copy of its weights (docs/training.md)."""

    count: Positive = 1
    """How many share what is written. May change between a stop and going on, as may their threads and gpus."""
    engine: Engine = "transformers"
    """What computes their copies."""
    threads: Positive = 1
    """CPU threads of each, and the CPUs that Ray reserves for it."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for each."""


class SamplingConfig(Config):
    """How a student writes its own sequences."""

    engine: Engine = "transformers"
    """What computes them: the trained model itself, or vLLM in the same process with its weights (docs/training.md)."""
    writers: WritersConfig | None = None
    """Processes of their own that write, on Ray; none writes in the student's process."""
    max_new_tokens: Positive = 128
    """Tokens to write at most; `batch.max_tokens` limits prompt and continuation together."""
    temperature: Temperature = 1.0
    """Sampling temperature. It has nothing to do with the objective's, but for an estimate from the sampled tokens
    (`policy_gradient_kl`), which takes the same one."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or continuation have already (Keskar
    et al. 2019); if not 1, the samples are not the student's own distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the samples are not the student's own distribution."""
    completions: Positive = 1
    """How often each prompt of a batch is continued, where the student writes; `batch.sequences` counts them all, so a
    step has 1/n of so many prompts. The teacher computes a prompt once for all of them."""
    rollout: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """package.module:function that writes a sequence with the student, such as one that has tools; it is given the row,
    a function that lets the student write, and the tokenizer (docs/training.md). None lets the student write once."""
    stream: bool = False
    """Whether the teacher scores what is written while it is written, if it reuses prefixes: for one with processors of
    its own; on the student's each waits for the other (docs/training.md). Changes no objective, and may change between
    a stop and going on."""
    max_staleness: NotNegative = 0
    """Steps by which the weights that wrote a sequence may be older than those that learn from it. 0 is strictly
    on-policy; with more, the teacher scores so many batches ahead while the student steps."""

    @property
    def written_by(self) -> Engine:
        """The engine that computes what is written, wherever that is."""
        return self.writers.engine if self.writers else self.engine


class OptimizerConfig(Config):
    """AdamW and its learning rate."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm", "schedule": "lr_scheduler_type"}

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak."""
    warmup_steps: NotNegative = 2
    """Steps of linear rise from 0."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    """After the warm-up; `linear` and `cosine` end at 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the two moments."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of a step."""


class LoraConfig(Config):
    """Low-rank adapters, which are trained instead of the weights (Hu et al. 2021, arXiv 2106.09685)."""

    RENAMED: ClassVar[dict[str, str]] = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}

    r: Positive = 8
    """Rank: the inner width of an adapter."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters are scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the adapters' inputs, while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get one, or endings of their full names."""


class BatchConfig(Config):
    """What one optimizer step sees."""

    sequences: Positive = 8
    """Sequences of a step; the loss is the mean over all their unmasked tokens."""
    micro_batch_sequences: Positive = 8
    """Sequences that go through the student at once; changes memory, not the loss, unless `reduction` or
    `on_policy_unit` is by micro-batch: then micro-batches are as the data's order makes them, not of like length."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest sequence, prompt and completion together."""


class BudgetConfig(Config):
    """What a training may spend in place of a number of steps: it ends with the step that spends the last of it."""

    scored_tokens: Positive | None = None
    """Tokens that the loss sees."""
    teacher_tokens: Positive | None = None
    """Tokens of the sequences that the teacher is asked about for the objective, prompts included."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.scored_tokens is None) == (self.teacher_tokens is None):
            raise ConfigurationError("give scored_tokens or teacher_tokens", "budget")
        return self

    @property
    def metric(self) -> str:
        """The metric that counts it, step by step."""
        return "train/tokens" if self.scored_tokens is not None else "train/teacher_tokens"

    @property
    def amount(self) -> int:
        """How many tokens."""
        return self.scored_tokens or self.teacher_tokens or 0


class StartConfig(Config):
    """Another student of the cohort to start from, when it has finished: with what it saved last, or best."""

    student: str
    """Its id."""


class HeldOutConfig(Config):
    """Sequences that are never trained on, on which the divergence from the teacher is measured."""

    sequences: NotNegative = 16
    """How many; 0 measures nothing."""
    data: SourceConfig | None = None
    """A data set of their own, of which no row is trained on; none takes them from each source by its weight."""
    every_steps: Positive = 10
    """Measured before training, every so many steps, and at the end."""


class BestConfig(Config):
    """Which checkpoint is the best, and when there is nothing more to hope for."""

    metric: HeldOutMetric = "heldout/forward_kl"
    """The best checkpoint is where it is lowest (`top1_agreement`: highest). Saved whenever it is the best so far,
    and kept; `checkpoints/best` points to it."""
    patience: Positive | None = None
    """Measurements in a row without a new best after which the training ends; none means never."""


class StudentSettings(Config):
    """What students may share."""

    RENAMED: ClassVar[dict[str, str]] = {"sinks": "report_to"}
    ELSEWHERE: ClassVar[dict[str, str]] = other_names.STUDENT

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
    preset: str | tuple[str, ...] = ()
    """Names of presets (trainer/config/presets.py); a later one lies over an earlier one."""
    lora: LoraConfig | None = None
    """Adapters to train; none trains all weights."""
    best: BestConfig | None = None
    """Keep the best checkpoint, and perhaps stop early; none keeps the newest only."""
    steps: Positive = 100
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the data, from which `steps` then follows."""
    budget: BudgetConfig | None = None
    """Tokens after which it ends, with `steps` as the most; the learning rate's schedule follows what is spent."""
    seed: NotNegative = 0
    """Of data order, sampling and noise. Held-out sequences and data order do not depend on the id, so
    students of one seed see the same."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of forward and backward; the optimizer always keeps float32 weights."""
    threads: Positive = 1
    """CPU threads of its process, and the CPUs that Ray reserves for it; of each worker, if there are several."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for it; for each worker, if there are several."""
    workers: Positive = 1
    """Processes that train it together, each on its share of every batch. May change between a stop and going on."""
    sharding: Literal["none", "full"] = "none"
    """Whether each of several workers has all weights, gradients and optimizer state, or its part of them
    (docs/training.md). May change between a stop and going on."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass, which takes less memory and more time."""
    loss_on_prompt: bool = False
    """Whether prompt tokens count as well."""
    loss_on_last_token: bool = False
    """Whether the position after the last token counts, which no target follows."""
    router_loss_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of the load-balancing loss of a student that has experts, over a micro-batch's tokens; 0 trains it without."""
    reduction: Literal["token_mean", "sequence_mean", "micro_batch_token_mean"] = "token_mean"
    """From values per token to the loss: every token, every sequence or every micro-batch counts the same."""
    on_policy_unit: Literal["sequence", "micro_batch"] = "sequence"
    """What is drawn to be the student's own: each sequence, or each micro-batch as a whole."""
    save_every_steps: Positive = 10
    """Steps between checkpoints; a crash costs at most so many."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep, besides the best one and those sent to the evaluator."""
    report_to: tuple[TrackerName, ...] = ()
    """Where metrics go besides `metrics.jsonl` and `metrics.parquet`; what a tracker cannot take in time it loses."""

    @property
    def shares(self) -> int:
        """How many parts a batch can be dealt out in; no more workers would have something to do."""
        size = self.batch.micro_batch_sequences if self.micro_batches_matter else 1
        return math.ceil(self.batch.sequences / size)

    @property
    def prompts_per_step(self) -> int:
        """Rows of the data that a step takes."""
        return self.batch.sequences // self.sampling.completions

    @property
    def micro_batches_matter(self) -> bool:
        """Whether the loss depends on which sequences go through the student together."""
        return self.reduction == "micro_batch_token_mean" or self.on_policy_unit == "micro_batch"


class StudentDefaults(StudentSettings):
    """Settings of every student that does not say otherwise."""

    init: Path | None = None
    """Hugging Face directory to start from."""
    data: DataConfig | None = None
    """What they read: a data set, or a list of several with weights."""


class StudentConfig(StudentSettings):
    """One student."""

    id: str
    """Its name, unique in the run: 1 to 64 of a-z 0-9 . _ -"""
    init: Path | StartConfig
    """Hugging Face directory to start from, or `{student: ID}`, another student of the cohort."""
    data: DataConfig
    """What it reads: a data set, or a list of several with weights."""

    @property
    def start(self) -> Path:
        """The directory that it starts from; one that starts from another student has it when that has finished."""
        assert isinstance(self.init, Path)
        return self.init

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The data sets that it reads."""
        return self.data.sources or (self.data,)

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        return check_name(value, "id")

    @model_validator(mode="before")
    @classmethod
    def _lay_over_presets(cls, values: Any) -> Any:
        return with_presets(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_together(self) -> StudentConfig:
        objective = self.objective
        whole = all(term.entry.needs_teacher and not term.entry.sampled_token for term in objective.weighted_terms)
        if self.loss_on_last_token and (objective.signal != "hidden" or not whole):
            raise ConfigurationError(
                f"no token follows the last one, but {objective.label} with signal {objective.signal} asks for it; "
                "leave this out, or compare distributions with signal: hidden",
                "loss_on_last_token",
            )
        if self.budget is not None and self.budget.teacher_tokens and not objective.needs_teacher:
            raise ConfigurationError(
                f"{objective.label} asks no teacher, so this would never be spent; give scored_tokens, or steps",
                "budget.teacher_tokens",
            )
        if self.budget is not None and self.epochs is not None:
            raise ConfigurationError("epochs say when it ends as well; leave one of them out", "budget")
        if objective.shuffle_teacher and (self.prompts_per_step < 2 or self.workers > 1):
            raise ConfigurationError(
                f"takes the answers of another prompt of the same batch in the same process, and there are "
                f"{self.prompts_per_step} prompts and {self.workers} workers; have at least 2 prompts, and one worker",
                "objective.shuffle_teacher",
            )
        if objective.equal_teacher and self.sharding == "full":
            raise ConfigurationError(
                "keeps all weights of the start with every worker; have sharding: none", "objective.equal_teacher"
            )
        if self.workers > self.shares:
            raise ConfigurationError(
                f"{self.workers} workers, but a batch has {self.shares} parts to deal out (sequences, or micro-batches "
                "if the loss depends on them); have fewer workers or more batch.sequences",
                "workers",
            )
        if self.sharding == "full":
            self._check_sharding()
        if self.epochs is not None and any(source.streaming for source in self.sources):
            raise ConfigurationError("a stream has no length that epochs could count; give steps", "epochs")
        if self.best and not self.held_out.sequences:
            raise ConfigurationError("is a held-out metric; give held_out.sequences", "best.metric")
        if self.sampling.rollout and objective.on_policy_fraction == 0:
            raise ConfigurationError(
                "says how the student writes, which it does not; leave it out, or give objective.on_policy_fraction",
                "sampling.rollout",
            )
        if self.sampling.completions > 1:
            self._check_completions()
        if objective.samples_tokens:
            self._check_sampled_token()
        if self.sampling.max_staleness:
            self._check_stale()
        if self.sampling.writers is not None:
            self._check_writers(self.sampling.writers)
        if self.sampling.written_by == "vllm":
            self._check_vllm()
        return self

    def _check_completions(self) -> None:
        count = self.sampling.completions
        if self.batch.sequences % count:
            raise ConfigurationError(
                f"{count} do not divide batch.sequences ({self.batch.sequences}), which counts them all",
                "sampling.completions",
            )
        if self.objective.on_policy_fraction == 0:
            raise ConfigurationError(
                f"{count}, but the student writes none; allowed is 1, or give objective.on_policy_fraction",
                "sampling.completions",
            )
        if self.on_policy_unit == "micro_batch":
            raise ConfigurationError(
                "micro_batch, but with several completions each prompt is drawn by itself; use sequence, or "
                "sampling.completions: 1",
                "on_policy_unit",
            )

    def _check_sampled_token(self) -> None:
        """Estimates from sampled tokens are expectations over the very distribution q that they compare."""
        name, T = self.objective.label, self.objective.temperature_of_student
        if self.sampling.temperature != T and not self.objective.importance_weights:
            raise ConfigurationError(
                f"{self.sampling.temperature}, but {name} compares the student at temperature {T}, and only tokens "
                f"that are drawn at it have that gradient in expectation; allowed is {T}, or any other with "
                "objective.importance_weights: true",
                "sampling.temperature",
            )
        if self.sampling.repetition_penalty != 1.0 and not self.objective.importance_weights:
            raise ConfigurationError(
                f"{self.sampling.repetition_penalty}, but {name} is an expectation over the student's own "
                "distribution; allowed is 1, or any other with objective.importance_weights: true",
                "sampling.repetition_penalty",
            )
        if self.sampling.top_p < 1.0:
            raise ConfigurationError(
                f"{self.sampling.top_p}, but {name} is an expectation over all of the student's tokens, and those that "
                "are cut off would never be seen; allowed is 1",
                "sampling.top_p",
            )
        if self.loss_on_prompt:
            raise ConfigurationError(
                f"true, but {name} is an expectation over the student's own tokens, which those of a prompt are not; "
                "allowed is false",
                "loss_on_prompt",
            )

    def _check_stale(self) -> None:
        objective, stale = self.objective, self.sampling.max_staleness
        if objective.samples_tokens and not objective.importance_weights:
            raise ConfigurationError(
                f"{objective.label} is an expectation over the present student's own tokens, which {stale} steps later "
                "they are not; use reverse_kl, which is computed with the present weights; importance_weights; or 0",
                "sampling.max_staleness",
            )
        if objective.signal == "candidates":
            raise ConfigurationError(
                f"candidates are the present student's likeliest ids, not those of {stale} steps before; use signal: "
                "hidden, or 0",
                "sampling.max_staleness",
            )

    def _check_sharding(self) -> None:
        if self.workers == 1:
            raise ConfigurationError("full, but there is one worker; have more workers, or sharding: none", "sharding")
        if self.router_loss_weight:
            raise ConfigurationError(
                f"{self.router_loss_weight}, but no router's loss is computed of a sharded student; allowed is 0, or "
                "sharding: none",
                "router_loss_weight",
            )
        if self.sampling.engine == "vllm":
            raise ConfigurationError(
                "vllm would keep all weights a second time with every worker; write with sampling.engine: "
                "transformers, or have sharding: none",
                "sharding",
            )

    def _check_writers(self, writers: WritersConfig) -> None:
        if self.objective.on_policy_fraction == 0:
            raise ConfigurationError(
                "the student writes nothing; leave them out, or give objective.on_policy_fraction", "sampling.writers"
            )
        if self.sampling.engine != "transformers":
            raise ConfigurationError(
                f"{self.sampling.engine} is of the student's own process, in which nothing is written where there are "
                "writers; say sampling.writers.engine in its place",
                "sampling.engine",
            )
        if self.workers > 1:
            raise ConfigurationError(
                f"writers take the weights of a student of one process, and this one has {self.workers} workers, each "
                "of which writes its share; have workers: 1, or leave the writers out",
                "sampling.writers",
            )
        if writers.count > self.batch.sequences:
            raise ConfigurationError(
                f"{writers.count} writers, but a batch has {self.batch.sequences} sequences to share; have fewer "
                "writers or more batch.sequences",
                "sampling.writers.count",
            )

    def _check_vllm(self) -> None:
        if self.sampling.temperature < LOWEST_VLLM_TEMPERATURE:
            raise ConfigurationError(
                f"{self.sampling.temperature} is below {LOWEST_VLLM_TEMPERATURE}, which vllm would take instead; use "
                "transformers, or a higher one",
                "sampling.temperature",
            )
