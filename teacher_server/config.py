"""What `tutelage teacher serve` can be told; importable without torch or vLLM.

vLLM's engine arguments are settings too, all that the installed vLLM has, under its own names. Their names come from
its source; their values are read by its own command line when the teacher starts.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from tutelage.config import Config
from tutelage.data.conversation_settings import ConversationSettings
from tutelage.names import check_host
from tutelage.rpc.tls import ClientAccess, ServerTls
from tutelage.runtime import vllm_api

Role = Literal["score", "write"]
Cores = Annotated[str, Field(pattern=r"^(auto|\d+(-\d+)?(,\d+(-\d+)?)*)$")]

_OF_THE_ROLE = "it is what makes an engine one that scores or writes"
_OF_THE_MODEL = "who the teacher is, its digests say, and they are of the files of `model`"
_NO_TEXT = "a teacher gets token ids and answers with numbers"
REFUSED: dict[str, str] = {
    "runner": _OF_THE_ROLE,
    "convert": _OF_THE_ROLE,
    "pooler_config": _OF_THE_ROLE,
    "skip_tokenizer_init": _OF_THE_ROLE,
    "enable_prompt_embeds": _NO_TEXT,
    "io_processor_plugin": _NO_TEXT,
    "tokenizer": _OF_THE_MODEL,
    "tokenizer_mode": _OF_THE_MODEL,
    "tokenizer_revision": _OF_THE_MODEL,
    "model_weights": _OF_THE_MODEL,
    "hf_config_path": _OF_THE_MODEL,
    "config_format": _OF_THE_MODEL,
    "code_revision": _OF_THE_MODEL,
    "trust_remote_code": "code that comes with a model is not run",
    "enable_lora": "`lora_modules` says which adapters there are",
}
"""Engine arguments of vLLM that a teacher is not told, each with the reason."""

_CHANGE_NUMBERS = (
    *("quantization", "quantization_config", "kv_cache_dtype", "hf_overrides", "model_class_overrides", "load_format"),
    *("disable_sliding_window", "lora_dtype"),
)
"""Engine arguments with which the same files are another teacher."""


def _number(given: Any) -> Any:
    """As vLLM reads numbers: `32k` is 32,000 and `32K` is 32,768 (`human_readable_int`)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", given) if isinstance(given, str) else None
    if match is None:
        return given
    power = "kmgt".index(match[2].lower()) + 1
    return int(float(match[1]) * (1000 if match[2].islower() else 1024) ** power)


_Number = BeforeValidator(_number)


class StoreConfig(Config):
    """Where hidden states are kept, so that what one student asked for costs the next no engine pass."""

    path: Path
    """Folder; made if it is missing, used by one teacher server at a time."""

    bytes: Annotated[int, Field(ge=0)] = 16 * 2**30
    """Size of one teacher's files; what was used longest ago goes first. A store that holds more already is refused."""

    shrink: bool = False
    """Delete at start, instead, what was used longest ago of a store that holds more than `bytes`."""


def _engine_arguments() -> dict[str, Any]:
    """Fields for vLLM's arguments; None where one is not given, which leaves vLLM its own default."""
    plain = {"bool": bool, "int": Annotated[int, _Number] | None, "float": float | None, "str": str | None}
    other = str | int | float | list[Any] | dict[str, Any] | None
    fields: dict[str, Any] = {}
    for name, annotation in vllm_api.engine_arguments().items():
        text = f"vLLM's engine argument, {annotation}."
        # `validate_default`: so that a flag takes no value and may still not be given. `exclude_if`: a resolved file
        # has those that were given.
        field = Field(None, description=text, validate_default=False, exclude_if=lambda given: given is None)
        fields[name] = (plain.get(annotation.removesuffix(" | None"), other), field)
    return fields


if TYPE_CHECKING:
    _EngineArguments = Config
else:
    _EngineArguments = create_model("_EngineArguments", __base__=Config, __module__=__name__, **_engine_arguments())


class TeacherConfig(_EngineArguments):
    """Serves one teacher over gRPC: `score` answers with signals, `write` with rationales.

    Takes vLLM's engine arguments too, under its names: how large a teacher is served, on which devices, quantized or
    not (`vllm serve --help=all` says what each means).
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "address": "host",
        "adapters": "lora_modules",
        "batch_sequences": "max_num_seqs",
        "batch_tokens": "max_num_batched_tokens",
        "compile": "enforce_eager",
        "kv_cache_gib": "kv_cache_memory_bytes",
        "max_sequence_tokens": "max_model_len",
        "model_name": "served_model_name",
    }

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "api_key": "token_file",
        "chat_template": "there is none to give: a teacher gets token ids",
        "ssl_ca_certs": "tls.client_ca",
        "ssl_certfile": "tls.certificate",
        "ssl_keyfile": "tls.key",
        "uvicorn_log_level": "log_format",
    }

    COMMON: ClassVar[tuple[str, ...]] = (
        *("model", "host", "port", "roles", "max_model_len", "dtype", "lora_modules", "served_model_name"),
        *("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "quantization"),
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens"),
        *(
            "store.path",
            "store.bytes",
            "address_file",
            "tls.certificate",
            "tls.key",
            "token_file",
            "metrics_port",
            "log_format",
        ),
    )

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

    host: Annotated[str, AfterValidator(check_host)] = "127.0.0.1"
    """Address to listen on, without the port."""

    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """Port to listen on; 0 chooses a free one."""

    address_file: Path | None = None
    """File that gets the final host:port once the teacher is serving."""

    tls: ServerTls | None = None
    """Certificate and key to serve with; needed to listen beyond loopback."""

    token_file: Path | None = None
    """File of bearer tokens, a line each: TOKEN SCOPE[,SCOPE…] [STUDENT], with scopes info, score and write;
    read again when it changes. None means that nobody needs a token."""

    isolate_students: bool = False
    """Keep apart what the scoring engine caches for each bearer token, so that nobody can tell by the time of an answer
    what another has asked; prompts that several tokens share are then computed for each. Needs `token_file`."""

    insecure: bool = False
    """Listen beyond loopback although nothing is encrypted or authenticated."""

    health_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of `host` that answers gRPC health checks and nothing else, unencrypted: what a scheduler that shows no
    certificate, such as Kubernetes, asks whether this serves. None means that only the main port answers."""

    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port that answers with Prometheus metrics, at /metrics, vLLM's own among them; none means none."""

    metrics_host: str = "127.0.0.1"
    """Address of that port. Whoever reaches it reads the students' names and how much each asks, without a token;
    beyond loopback by https where there is `tls`."""

    reflection: bool = False
    """Answer gRPC server reflection."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the engines compute in."""

    max_model_len: Annotated[int, _Number, Field(ge=8)] | None = None
    """Longest sequence, prompt and continuation together; by default the model's own limit, cut to what the key-value
    cache holds. On a CPU with the role write at most 2048, because no prompt may be computed in part there."""

    max_num_batched_tokens: Annotated[int, _Number, Field(ge=2)] | None = None
    """Tokens an engine computes at once; of a longer sequence one such piece after the other. By default 8192 on a GPU,
    512 on a CPU, where more are no faster and only make the signal head wait."""

    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Sequences an engine works on at once, at most."""

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
    """Share of students by RUN.STUDENT, relative to the others' 1."""

    store: StoreConfig | None = None
    """Where hidden states are kept; none means that they are computed again, but for what the engine has cached."""

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

    @model_validator(mode="after")
    def _can_isolate(self) -> TeacherConfig:
        if self.isolate_students and self.token_file is None:
            raise ValueError("isolate_students keeps bearer tokens apart, and there are none; name their file with "
                             "token_file")  # fmt: skip
        if self.isolate_students and self.store is not None:
            raise ValueError("isolate_students keeps students apart, and a store answers one with what another asked; "
                             "leave one of the two out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _no_argument_that_is_ours(self) -> TeacherConfig:
        for name, reason in REFUSED.items():
            if getattr(self, name, None) is not None:
                raise ValueError(f"{name} is not for you to say: {reason}; leave it out")
        if "head_dtype" in (getattr(self, "hf_overrides", None) or {}):
            raise ValueError(f"hf_overrides: head_dtype is not for you to say: {_OF_THE_ROLE}; leave it out")
        return self

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """What was given of vLLM's arguments that are no setting of ours, by name, as it was given."""
        names = vllm_api.engine_arguments().keys() - TeacherConfig.__annotations__.keys()
        given = {name: getattr(self, name) for name in sorted(names)}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def other_numbers(self) -> dict[str, Any]:
        """The engine arguments that were given with which the same files are another teacher."""
        return {name: value for name, value in self.engine_arguments.items() if name in _CHANGE_NUMBERS}

    @property
    def processes(self) -> int:
        """How many processes compute for one engine."""
        return self._product_of_sizes("tensor", "pipeline", "data")

    @property
    def batches_at_once(self) -> int:
        """How many batches all scoring engines compute at the same time: a stage of a pipeline has one of its own."""
        return self.score_engines * self._product_of_sizes("pipeline", "data")

    def _product_of_sizes(self, *kinds: str) -> int:
        return math.prod(int(self.engine_arguments.get(f"{kind}_parallel_size", 1)) for kind in kinds)

    @property
    def batched_tokens(self) -> int:
        """`max_num_batched_tokens`, or what suits the device."""
        return self.max_num_batched_tokens or (8192 if _on_a_gpu() else 512)

    @property
    def length_fits_the_cache(self) -> bool:
        """Whether the longest sequence is what the key-value cache holds, of what the model allows."""
        return self.max_model_len is None and (_on_a_gpu() or "write" not in self.roles)

    @property
    def served_name(self) -> str:
        """The name shown to people."""
        return self.served_model_name or Path(self.model).name


def _on_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class PrecomputeConfig(TeacherConfig, ConversationSettings):
    """Fills the signal store of a teacher for a data set, without a server.

    Takes all settings of `serve`, so that one file describes both; it uses those of the model, the engine and the
    store.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("model", "data", "store.path", "store.bytes", "max_tokens", "template", "chat_template", "teacher_system"),
        *("max_model_len", "dtype", "lora_modules", "gpu_memory_utilization", "max_num_batched_tokens"),
    )

    data: Path
    """A .jsonl, .json or .parquet file, in the forms that `tutelage train` takes."""

    max_tokens: Annotated[int, Field(ge=2)] = 512
    """As their `batch.max_tokens`: prompt and completion together."""

    @model_validator(mode="after")
    def _has_a_store(self) -> PrecomputeConfig:
        if self.store is None:
            raise ValueError("there is no store to fill; give its folder with --store.path")
        return self


class GenerateConfig(ClientAccess, ConversationSettings):
    """Has a served teacher generate for a file of prompts, and makes a data set of it; goes on where it was stopped."""

    COMMON: ClassVar[tuple[str, ...]] = (
        *("data", "out", "tokenizer", "address", "samples", "temperature", "top_p", "max_new_tokens", "seed"),
        *("answer_pattern", "answer_column", "template", "token_file"),
    )

    data: Path
    """A .jsonl, .json or .parquet file of prompts, in the forms that `tutelage train` takes."""

    out: Path
    """The data set, .jsonl, .json or .parquet: the prompts' rows with what was generated; `<out>.part` holds what is
    generated so far."""

    tokenizer: Path
    """Directory with the teacher's tokenizer: its checkpoint, or a student's."""

    address: str = "127.0.0.1:50051"
    """host:port of a teacher that was started with the role write."""

    adapter: str | None = None
    """Name of the LoRA adapter that is to generate; none means the base model."""

    student_id: str = "write"
    """Name under which the teacher counts the work."""

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
