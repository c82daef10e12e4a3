"""What `tutelage teacher serve` can be told; importable without torch or vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.config import Config
from tutelage.data.prompts import Template
from tutelage.rpc.tls import ClientAccess, ServerTls

Role = Literal["score", "write"]
Cores = Annotated[str, Field(pattern=r"^(auto|\d+(-\d+)?(,\d+(-\d+)?)*)$")]


class StoreConfig(Config):
    """Where hidden states are kept, so that what one student asked for costs the next no engine pass."""

    path: Path
    """Folder; made if it is missing, used by one teacher server at a time."""

    bytes: Annotated[int, Field(ge=0)] = 16 * 2**30
    """Size of one teacher's files; what was used longest ago goes first. A store that holds more already is refused."""

    shrink: bool = False
    """Delete at start, instead, what was used longest ago of a store that holds more than `bytes`."""


class TeacherConfig(Config):
    """Serves one teacher over gRPC: `score` answers with signals, `write` with rationales.

    A setting that is one of vLLM's engine arguments has its name.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "adapters": "lora_modules",
        "batch_sequences": "max_num_seqs",
        "batch_tokens": "max_num_batched_tokens",
        "compile": "enforce_eager",
        "kv_cache_gib": "kv_cache_memory_bytes",
        "max_sequence_tokens": "max_model_len",
        "model_name": "served_model_name",
    }

    model: str
    """Directory of a Hugging Face checkpoint with safetensors weights, or its name on the hub."""

    revision: str | None = None
    """Revision of a model on the hub: a branch, a tag or, better, a commit."""

    lora_modules: dict[str, Path] = Field(default_factory=dict)
    """LoRA adapters by name (PEFT directories): each is a teacher of its own, served by the same engines."""

    served_model_name: str = ""
    """Name shown to people; by default the last part of `model`."""

    roles: Annotated[tuple[Role, ...], Field(min_length=1)] = ("score",)
    """What this process does; each role is one engine."""

    address: str = "127.0.0.1:50051"
    """host:port to listen on; port 0 chooses a free one."""

    address_file: Path | None = None
    """File that gets the final host:port once the teacher is serving."""

    tls: ServerTls | None = None
    """Certificate and key to serve with; needed to listen beyond loopback."""

    token_file: Path | None = None
    """File of bearer tokens, a line each: TOKEN SCOPE[,SCOPE…] [STUDENT], with scopes info, score and write;
    read again when it changes. None means that nobody needs a token."""

    insecure: bool = False
    """Listen beyond loopback although nothing is encrypted or authenticated."""

    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of loopback that answers with Prometheus metrics, at /metrics; none means none."""

    reflection: bool = False
    """Answer gRPC server reflection."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the engines compute in."""

    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest sequence, prompt and continuation together; by default the model's own limit, at most 2048."""

    max_num_batched_tokens: Annotated[int, Field(ge=2)] | None = None
    """Tokens an engine computes at once, about; at least one longest sequence always fits. By default 8192 on a GPU,
    512 on a CPU, where more are no faster and only make the signal head wait."""

    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Sequences an engine works on at once, at most."""

    kv_cache_memory_bytes: Annotated[int, Field(gt=0)] = 2**30
    """Key-value cache of each engine, bytes."""

    enforce_eager: bool = True
    """Do not let vLLM compile the model; compiling is a slower start, for a faster engine where that pays."""

    score_engines: Annotated[int, Field(ge=1)] = 1
    """On the CPU: engines that score, each with a copy of the model and its share of the cores; a sequence goes to the
    one that has the least to do. Two or more use the cores fully, also that of the signal head, for more memory."""

    score_cores: Cores = "auto"
    """On the CPU: cores of the scoring engines, as "0-3". "auto" leaves the last `head_threads` to the signal head, and
    one at least to the engine; several engines get all. Where cores are left, the server's own threads stay off the
    engines'."""

    write_cores: Cores = "auto"
    """On the CPU: cores of the generating engine; "auto" gives each of two engines half of the cores."""

    head_threads: Annotated[int, Field(ge=1)] = 1
    """Threads that turn hidden states into signals, beside the engine."""

    head_mib: Annotated[int, Field(ge=1)] = 96
    """Memory of the head's work on logits, all threads together, MiB: it bounds the rows computed at once."""

    head_device: str = "auto"
    """Device of the signal head, as torch names it; "auto" is a GPU if there is one."""

    max_k: Annotated[int, Field(ge=1)] = 1024
    """Largest k of `topk`, and most candidates a row."""

    max_temperatures: Annotated[int, Field(ge=1)] = 16
    """Most temperatures in one request."""

    max_samples: Annotated[int, Field(ge=1)] = 16
    """Most continuations of one prompt in one request."""

    max_requests_in_flight: Annotated[int, Field(ge=1)] = 32
    """Requests worked on at once for one stream; further ones wait unread."""

    max_waiting_requests: Annotated[int, Field(ge=1)] = 1024
    """Requests that wait for an engine; beyond that, students that have their share of the places are refused."""

    max_streams: Annotated[int, Field(ge=1)] = 256
    """Calls open at once, at most."""

    stream_mib: Annotated[int, Field(ge=1)] = 64
    """Hidden states that one stream holds for answers its student has not read yet, MiB."""

    stall_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A stream whose student reads nothing for so long while answers wait for it is ended."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Share of students by id, relative to the others' 1."""

    store: StoreConfig | None = None
    """Where hidden states are kept; none means that every request is an engine pass."""

    frame_bytes: Annotated[int, Field(ge=64 * 2**10, le=512 * 2**10)] = 256 * 2**10
    """Size of an answer's frames, bytes."""

    drain_seconds: Annotated[float, Field(ge=0)] = 20.0
    """After SIGTERM, how long requests in flight may take to finish."""

    log_format: Literal["text", "json"] = "text"
    """Lines on standard error: for people, or JSON with the ids of students and requests."""

    engine_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "ERROR"
    """How much of vLLM's own log appears."""

    @model_validator(mode="after")
    def _each_role_once(self) -> TeacherConfig:
        if len(set(self.roles)) != len(self.roles):
            raise ValueError(f"roles {list(self.roles)} names a role twice; use score, write or both")
        return self

    @property
    def batched_tokens(self) -> int:
        """`max_num_batched_tokens`, or what suits the device."""
        import torch

        return self.max_num_batched_tokens or (8192 if torch.cuda.is_available() else 512)

    @property
    def served_name(self) -> str:
        """The name shown to people."""
        return self.served_model_name or Path(self.model).name


class PrecomputeConfig(TeacherConfig):
    """Fills the signal store of a teacher for a data set, without a server.

    Takes all settings of `serve`, so that one file describes both; it uses those of the model, the engine and the
    store.
    """

    data: Path
    """A .jsonl, .json or .parquet file, in the forms that `tutelage train` takes."""

    template: Template = "chat"
    """As `data.template` of the students that will read the store."""

    max_tokens: Annotated[int, Field(ge=2)] = 512
    """As their `batch.max_tokens`: prompt and completion together."""

    @model_validator(mode="after")
    def _has_a_store(self) -> PrecomputeConfig:
        if self.store is None:
            raise ValueError("there is no store to fill; give its folder with --store.path")
        return self


class GenerateConfig(ClientAccess):
    """Has a served teacher generate for a file of prompts, and makes a data set of it; goes on where it was stopped."""

    data: Path
    """A .jsonl, .json or .parquet file of prompts, in the forms that `tutelage train` takes."""

    out: Path
    """The data set, .jsonl, in a form that `tutelage train` takes; `<out>.part` holds what is generated so far."""

    tokenizer: Path
    """Directory with the teacher's tokenizer: its checkpoint, or a student's."""

    address: str = "127.0.0.1:50051"
    """host:port of a teacher that was started with the role write."""

    adapter: str | None = None
    """Name of the LoRA adapter that is to generate; none means the base model."""

    student_id: str = "write"
    """Name under which the teacher counts the work."""

    template: Template = "chat"
    """How a row becomes a prompt: the tokenizer's chat template, or one of those in docs/training.md."""

    samples: Annotated[int, Field(ge=1)] = 1
    """Continuations of each prompt."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens to generate at most; a continuation that reaches it is left out."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of the sampling; 0 is greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampling."""

    stop: tuple[str, ...] = ()
    """Strings that end a continuation."""

    answer_pattern: str | None = None
    """Keep only continuations whose last match of this regular expression (its first group, if it has one) is the
    data's answer, compared as numbers where both are."""

    answer_column: str = "answer"
    """Column of the data's answers; the pattern is applied to them too, where it matches."""

    prompts_at_once: Annotated[int, Field(ge=1)] = 32
    """Prompts in flight."""
