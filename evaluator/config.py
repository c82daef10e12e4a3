"""What the evaluator can be told: the settings that every evaluation shares, the command's and the service's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from tutelage.config import Config
from tutelage.data.prompts import Template
from tutelage.names import check_host
from tutelage.rpc.tls import ClientAccess, ServerTls

EngineName = Literal["transformers", "vllm"]
Dtype = Literal["bfloat16", "float16", "float32"]
_BATCH_SIZE: dict[EngineName, int] = {"vllm": 128, "transformers": 32}


def _items_or_share(limit: float) -> float:
    if limit < 0 or limit != int(limit) > 0:
        raise ValueError("give a number of items, or a share below 1; 0 is all")
    return limit


Limit = Annotated[int | float, AfterValidator(_items_or_share)]


def installed_engine() -> EngineName:
    """`vllm` where it is installed, which no extra of this package does; else `transformers`."""
    return "vllm" if find_spec("vllm") else "transformers"


class EvaluationSettings(Config):
    """How items are asked and answered; all of it is in the rows."""

    RENAMED: ClassVar[dict[str, str]] = {"batch_items": "batch_size"}
    ELSEWHERE: ClassVar[dict[str, str]] = {
        "apply_chat_template": "--prompt chat asks with the model's own template",
        "device": "a GPU is used if there is one; CUDA_VISIBLE_DEVICES chooses which",
        "fewshot_as_multiturn": "every protocol here asks without examples",
        "gen_kwargs": "give --sampling-temperature and --max-new-tokens",
        "include_path": "name the YAML file of a task of your own in --tasks",
        "log_samples": "every item is a row of the frames, and --output-path writes the harness's samples too",
        "max_batch_size": "batch_size",
        "max_gen_toks": "max_new_tokens",
        "num_fewshot": "every protocol here asks without examples (zero-shot)",
        "system_instruction": "the prompts are those of --prompt",
        "template": "prompt",
        "tensor_parallel_size": "a checkpoint is evaluated on one GPU",
        "trust_remote_code": "a model's own code is not run; give one of an architecture that transformers has",
        "write_out": "every item is a row of the frames, with what was written and what was read of it",
        "use_cache": "finished batches are kept without being asked for, and the same command goes on with them",
    }

    prompt: Template = "alpaca_leaked_indentation"
    """Prompt template of the protocol `paper`: LLM-Adapters' own, or the one that the model was trained with
    (`data.template`; docs/training.md has them)."""
    sampling_temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of generated answers; 0 is greedy. The paper's authors sampled at 1."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Length limit of generated answers; by default each task's own."""
    engine: EngineName = Field(default_factory=installed_engine)
    """What generates: `vllm` is faster, `transformers` starts faster, which pays for few items of a small
    model. By default vllm where it is installed. Choices are always scored by transformers."""
    dtype: Dtype = "bfloat16"
    """Arithmetic of the model."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Items handled together and made durable together; by default 128 with `vllm`, 32 with `transformers`."""
    data_dir: Path | None = None
    """Folder with `tasks/<task>/test.json`; by default what TUTELAGE_DATA_DIR names."""

    @property
    def engine_batch_size(self) -> int:
        """`batch_size`, or the engine's own."""
        return self.batch_size or _BATCH_SIZE[self.engine]


class Asked(Config):
    """One checkpoint, what it is scored on, and what its rows are called."""

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "model": "checkpoint",
        "model_args": "name the model by --checkpoint, its arithmetic by --dtype",
        "pretrained": "checkpoint",
        "temperature": "of sampling it is sampling_temperature; of the training, for the rows, training_temperature",
        "tokenizer": "it is the checkpoint's own",
    }

    checkpoint: Path
    """Hugging Face directory of a causal language model, or OWNER/NAME[@REVISION] of one on the hub."""
    tasks: str
    """Comma-separated TASK or TASK:PROTOCOL, for example `gsm8k,arc_easy:loglik`, or `all`. Names are ours or
    lm-evaluation-harness', or a YAML file; without a protocol choices are scored by `loglik`, answers by `paper`."""
    limit: Limit = 0
    """Items of each task, the first ones of its file; below 1 that share of them; 0 is all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling."""
    run: str | None = None
    """Name of the run, for the rows. This and what follows: by default as the checkpoint's training left it
    (`student.yaml`, `state.json`); of a model from elsewhere the run is `default`."""
    student: str | None = None
    """Name of the model, for the rows; of a model from elsewhere by default the folder's."""
    teacher: str = ""
    """Name of its teacher, for the rows. Rows of a model without teacher and objective are a teacher's in reports."""
    objective: str | None = None
    """Objective that it was trained with, for the rows."""
    training_temperature: Annotated[float, Field(ge=0)] | None = None
    """Temperature of the distillation, for the rows; 0 if it does not apply."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Noise on the teacher's logits, for the rows."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps done, for the rows."""
    training_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the training, for the rows."""


class EvaluateConfig(Asked, EvaluationSettings):
    """Scores one checkpoint on tasks and writes a Parquet frame, one row an item."""

    ELSEWHERE: ClassVar[dict[str, str]] = {
        **EvaluationSettings.ELSEWHERE,
        **Asked.ELSEWHERE,
        "frames": "out",
        "output_dir": "out",
    }
    COMMON: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "tasks",
        "limit",
        "out",
        "output_path",
        "engine",
        "run",
        "student",
    )

    out: Path = Path("frames")
    """Folder of the frames."""
    output_path: Path | None = None
    """Besides, a folder for results and samples as lm-evaluation-harness writes them."""


class WatchConfig(EvaluationSettings):
    """Scores every checkpoint of a run, also those that its students have yet to write."""

    COMMON: ClassVar[tuple[str, ...]] = ("run_dir", "tasks", "limit", "out", "engine", "prompt", "once")

    run_dir: Path
    """Folder of the run, with `students/<id>/checkpoints/step-<step>/`."""
    tasks: str
    """Comma-separated TASK or TASK:PROTOCOL, or `all`; as `tutelage evaluate` has them."""
    limit: Limit = 0
    """Items of each task, the first ones of its file; below 1 that share of them; 0 is all."""
    out: Path = Path("frames")
    """Folder of the frames."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling."""
    teacher: str = ""
    """Name of the students' teacher, for the rows."""
    once: bool = False
    """Ends after the checkpoints that are there; by default it waits for more until it is interrupted."""
    poll_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Pause before it looks again."""


class ServeConfig(EvaluationSettings):
    """Serves evaluations over gRPC from a queue on disk."""

    ELSEWHERE: ClassVar[dict[str, str]] = {
        **EvaluationSettings.ELSEWHERE,
        "address": "give --host and --port, as to tutelage teacher serve",
        "out": "frames",
    }
    COMMON: ClassVar[tuple[str, ...]] = (
        *("host", "port", "frames", "queue", "engine", "prompt", "workers"),
        *("address_file", "tls.certificate", "tls.key", "token_file", "metrics_port"),
    )

    host: Annotated[str, AfterValidator(check_host)] = "127.0.0.1"
    """Address to listen on, without the port."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50052
    """Port to listen on; 0 chooses a free one."""
    frames: Path = Path("frames")
    """Folder of the frames."""
    queue: Path = Path("evaluations")
    """Folder of the queue."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Evaluations at the same time; each has a model of its own in memory."""
    address_file: Path | None = None
    """Written with the address once the service answers."""
    tls: ServerTls | None = None
    """Certificate and key; needed to listen beyond loopback."""
    token_file: Path | None = None
    """File of bearer tokens, a line each: TOKEN SCOPE[,SCOPE…] [STUDENT], with scopes info and submit; read again
    when it changes. Without it, whoever reaches the address may do everything."""
    insecure: bool = False
    """Allows an address other than loopback although nothing is encrypted."""
    health_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of `host` that answers gRPC health checks and nothing else, unencrypted: what a scheduler that shows no
    certificate, such as Kubernetes, asks whether this serves. None means that only the main port answers."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port that answers with Prometheus metrics, at /metrics; none means none."""
    metrics_host: str = "127.0.0.1"
    """Address of that port. Whoever reaches it reads the names of runs and students and their scores, without a token;
    beyond loopback by https where there is `tls`."""


class ServiceConfig(ClientAccess):
    """Where the evaluation service is, for the commands that ask it."""

    ELSEWHERE: ClassVar[dict[str, str]] = {"ca": "tls.ca", "certificate": "tls.certificate", "key": "tls.key"}

    address: str = "127.0.0.1:50052"
    """host:port of `tutelage evaluate serve`."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long to wait for an answer."""


class SubmitConfig(ServiceConfig, Asked):
    """Queues an evaluation of one checkpoint at a served evaluator, on a file system that both see."""

    ELSEWHERE: ClassVar[dict[str, str]] = {**ServiceConfig.ELSEWHERE, **Asked.ELSEWHERE}
    COMMON: ClassVar[tuple[str, ...]] = ("checkpoint", "tasks", "limit", "address", "run", "student", "teacher")

    evaluation_id: str | None = None
    """Its name; by default made of what is asked, so that the same again is the same evaluation."""


class ListConfig(ServiceConfig):
    """Lists the evaluations of a served evaluator, the oldest first."""

    run: str = ""
    """Only those of this run."""


class WaitConfig(ListConfig):
    """Waits until evaluations have ended, prints their scores, and fails if one of them did."""

    evaluation_id: str | None = None
    """The evaluation, also without the flag's name; none means all of the run, or all."""
    poll_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Pause before it looks again."""


class CancelConfig(ServiceConfig):
    """Ends an evaluation that waits or runs; complete tasks keep their rows."""

    evaluation_id: str
    """The evaluation, also without the flag's name."""


class ExportConfig(Config):
    """Writes what the rows say in a form that other tools read."""

    frames: Path = Path("frames")
    """Folder of the frames."""
    run: str | None = None
    """Only rows of this run."""
    format: Literal["lm-eval", "csv", "markdown"] = "markdown"
    """`lm-eval`: results and samples as lm-evaluation-harness writes them; the others: one table of the summaries."""
    out: Path = Path("exported")
    """Folder to write to."""
    tasks: str = ""
    """YAML files of tasks of your own among the rows, with commas: where `lm-eval` takes their documents from."""
    data_dir: Path | None = None
    """Folder of the tasks' data, for the same; by default what TUTELAGE_DATA_DIR names."""


class ArithmeticConfig(Config):
    """Writes arithmetic word problems with worked rationales, a record each."""

    split: Literal["train", "test"] = "train"
    """The two splits share no set of numbers."""
    count: Annotated[int, Field(ge=1)] = 400
    """How many problems."""
    seed: int = 0
    """The same seed gives the same problems."""
    out: Path
    """File to write: .json, .jsonl or .parquet."""


class ReportConfig(Config):
    """Writes a self-contained HTML report from frames, with its figures and tables beside it.

    With `--from-paper` instead: the published study's tests from its released tables, and what survives of them.
    """

    frames: Path = Path("frames")
    """Folder of the frames."""
    run_dir: Path | None = None
    """Folder of the run, for learning curves (`students/*/metrics.jsonl`) and `teacher_usage.json`."""
    run: str | None = None
    """Only rows of this run."""
    out: Path = Path("report.html")
    """File to write; figures and tables go to folders beside it."""
    study: Path | None = None
    """Folder of a study: its report instead, as HTML and as `report.md` beside it."""
    from_paper: Path | None = None
    """Folder of the published study's CSV tables; prints its statistics and their audit as Markdown, and
    writes `report.md`, `report.html` and `tables/` to the folder of `out`."""


class ItemsConfig(Config):
    """Prints what the items of tasks ask, one JSON object a line."""

    tasks: str
    """Comma-separated names of tasks, ours or lm-evaluation-harness', or YAML files."""
    data_dir: Path | None = None
    """Folder with `tasks/<task>/test.json`; by default what TUTELAGE_DATA_DIR names."""


class TasksConfig(Config):
    """Lists the tasks, what is known against them, and whether their data is here."""

    data_dir: Path | None = None
    """Folder with `tasks/<task>/test.json`; by default what TUTELAGE_DATA_DIR names."""
