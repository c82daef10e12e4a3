"""Scoring and generation on vLLM's asynchronous engine, through its public interface alone.

Scoring runs the pooling runner, which returns the final hidden state of every token (`scoring_arguments`); generation
runs the generate runner. How large an engine is, and on which devices, vLLM's own arguments say
(`TeacherConfig.engine_arguments`). vLLM's behaviours that lines here answer to were read in 0.32.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tutelage.errors import ConfigurationError, TutelageError, Unreachable
from tutelage.runtime import vllm_api
from tutelage.runtime.processes import sparing_children_interrupts
from tutelage.teacher_server.config import Role, TeacherConfig
from tutelage.teacher_server.engine.base import CompletionDelta, ComputedStates, Engine, Sampling
from tutelage.teacher_server.engine.cpu_affinity import cores_of, keep_off, shares_of
from tutelage.teacher_server.engine.data_parallel import DataParallelScoringEngine
from tutelage.teacher_server.engine.lora_adapters import Adapter, lora_rank, read_adapters
from tutelage.teacher_server.engine.metrics import EngineMetrics

if TYPE_CHECKING:
    import torch
    from prometheus_client.core import Metric

_SPAWN_CHECK_SECONDS = 0.05
# An engine has nothing to save; after so long vLLM kills its process.
_SHUTDOWN_SECONDS = 1.0
# On a CPU vLLM would take a share of the machine's memory (`gpu_memory_utilization`), which students use too.
_CPU_CACHE_BYTES = 2**30
# Of a GPU's memory, all engines of a process together: the rest is the signal head's and CUDA's own.
_GPU_UTILIZATION = 0.9
# For the states of one sequence.
_ATTEMPTS = 4
_DEAD = "the teacher's {} engine is dead; start the teacher again"


def prepare_environment(config: TeacherConfig) -> None:
    """Sets what torch, vLLM and its children read from the environment; to be called before either is used."""
    # torch's allocator then asks Linux for pages of 2 MiB: the head's 0.57 ms a token became 0.51 (docs/teacher.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ["VLLM_LOGGING_LEVEL"] = config.engine_log_level  # vLLM reads it once, when it is imported
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it sends model and hardware to its makers
    if config.engine_log_level == "ERROR":
        # What torch's C++ and Python's warnings say in the engines' processes goes past vLLM's logger.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")


def start_engines(checkpoint: Path, config: TeacherConfig, max_model_len: int) -> dict[Role, Engine]:
    """Starts the engines of all roles side by side and waits until their models are loaded (tens of seconds).

    Raises:
        ConfigurationError: vLLM does not start with this configuration.

    """
    if config.score_engines > 1 and not vllm_api.current_platform.is_cpu():
        message = f"given {config.score_engines}, allowed: 1, except on a CPU; use vLLM's data_parallel_size"
        raise ConfigurationError(message, "score_engines")
    wanted: list[tuple[Role, int, list[int]]] = []
    for role in config.roles:
        cores = cores_of(role, config, sorted(os.sched_getaffinity(0)))
        shares = shares_of(cores, config.score_engines if role == "score" else 1)
        wanted += [(role, replica, share) for replica, share in enumerate(shares)]
    with ThreadPoolExecutor(len(wanted), thread_name_prefix="start-engine") as threads:
        starting = []
        for role, replica, share in wanted:
            spawned = len(multiprocessing.active_children())
            starting.append(threads.submit(_start, role, replica, checkpoint, config, max_model_len, share))
            # vLLM configures itself through globals (`set_current_vllm_config`) and the environment, so one process is
            # spawned after the other; from then on they load their models side by side.
            while not starting[-1].done() and len(multiprocessing.active_children()) == spawned:
                time.sleep(_SPAWN_CHECK_SECONDS)
        engines = [engine.result() for engine in starting]
    if vllm_api.current_platform.is_cpu():
        keep_off({core for _, _, share in wanted for core in share})
    started: dict[Role, Engine] = {}
    for role in config.roles:
        own = [engine for (of_role, _, _), engine in zip(wanted, engines, strict=True) if of_role == role]
        started[role] = DataParallelScoringEngine(own) if role == "score" else own[0]
    return started


def _start(
    role: Role, replica: int, checkpoint: Path, config: TeacherConfig, max_model_len: int, cores: Sequence[int]
) -> VllmScoringEngine | VllmGenerationEngine:
    arguments = {
        "max_num_seqs": config.max_num_seqs,
        # For what is not computed in parts (`generation_arguments`): room for the longest.
        "max_num_batched_tokens": config.batched_tokens
        if role == "score"
        else max(config.batched_tokens, max_model_len),
        "disable_log_stats": config.metrics_port is None,
        "served_model_name": config.served_name,
        "use_tqdm_on_load": False,
        **lora_arguments(config),
        **device_arguments(config, cores),
        # What was asked for comes last, but for what makes the engine what it is.
        **(given := vllm_api.parsed_arguments(config.engine_arguments)),
        **(scoring_arguments() if role == "score" else generation_arguments()),
        "model": str(checkpoint),
        "dtype": config.dtype,
        "max_model_len": -1 if config.length_fits_the_cache else max_model_len,  # -1 is vLLM's "auto"
    }
    if role == "score":
        arguments["hf_overrides"] |= given.get("hf_overrides", {})
    metrics = None if arguments["disable_log_stats"] else EngineMetrics(role, replica)
    loggers = [metrics.stat_logger()] if metrics else None
    try:
        with sparing_children_interrupts():
            llm = without_destructor(vllm_api.AsyncLLM).from_engine_args(
                vllm_api.AsyncEngineArgs(**arguments), stat_loggers=loggers
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"vLLM does not start an engine to {role} with this configuration: {error}") from error
    return VllmScoringEngine(llm, metrics) if role == "score" else VllmGenerationEngine(llm, metrics)


def without_destructor(kind: Any) -> Any:
    """A class as it is, but for `__del__`.

    That of AsyncLLM shuts the engine down once more. Here that is done by name; and at the end of the interpreter, when
    what it needs of its module is gone, it fails ("Exception ignored in … AsyncLLM.__del__").
    """
    return type(kind.__name__, (kind,), {"__del__": lambda _self: None})


def lora_arguments(config: TeacherConfig) -> dict[str, Any]:
    """What an engine needs for the adapters."""
    adapters = read_adapters(config)
    if not adapters:
        return {}
    rank = lora_rank(adapters, get_args(vllm_api.MaxLoRARanks))
    return {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}


def device_arguments(config: TeacherConfig, cores: Sequence[int]) -> dict[str, Any]:
    """What vLLM is told of the device where the configuration says nothing: memory, processes, compiling.

    On a CPU it also gives this thread its cores, and with it the processes that it spawns for the engine.
    """
    given = config.engine_arguments
    if not vllm_api.current_platform.is_cpu():
        return {"gpu_memory_utilization": _GPU_UTILIZATION / len(config.roles)}
    os.sched_setaffinity(0, cores)
    # Compiling takes minutes at the first start. Only whole blocks of what is cached are reused: vLLM's own have 128
    # tokens here, and attention on a CPU takes multiples of 32.
    arguments: dict[str, Any] = {"enforce_eager": True, "block_size": 32}
    if "gpu_memory_utilization" not in given:
        arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    if config.processes == 1:
        # vLLM would add a process for the worker. Its front end spins for a second after each answer while it waits for
        # the next (`SpinCondition` in shm_broadcast.py): 0.9 ms a token on the head's core.
        arguments["distributed_executor_backend"] = vllm_api.UniProcExecutor
    else:
        # By itself vLLM gives processes of one NUMA node the same cores.
        shares = [",".join(map(str, share)) for share in shares_of(cores, config.processes)]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(shares)
    return arguments


def scoring_arguments() -> dict[str, Any]:
    """What makes a vLLM engine one that answers with the final hidden state of every token that it computes.

    vLLM's own `prompt_logprobs` would be the obvious way to a teacher's distributions. It knows no temperature, makes
    Python objects of its tensors (a third of the speed for k = 64, docs/teacher.md), and its float32 log-softmax over
    the vocabulary is memory that its profile does not count.
    """
    return {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": vllm_api.PoolerConfig(task="token_embed", use_activation=False),
        # `ModelConfig.head_dtype` is float32 for pooling models: the same numbers, in twice the bytes.
        "hf_overrides": {"head_dtype": "model"},
        "skip_tokenizer_init": True,  # token ids in, states out: nothing is ever text
    }


def generation_arguments() -> dict[str, Any]:
    """What a vLLM engine needs to generate on this device.

    After a step in which a prompt was computed in part, vLLM takes back what it drew for it: it moves the request's
    generator back (`gen.set_offset(gen.get_offset() - 4)` in gpu_model_runner.py), which torch's generators on a CPU
    cannot ("CPU Generator does not use offset"), and the engine dies. So no prompt is computed in part there. A batch
    always has room for the longest sequence, hence every prompt, also one that is computed again after a preemption.
    """
    return {"enable_chunked_prefill": False} if vllm_api.current_platform.is_cpu() else {}


def version() -> str:
    """Name and version of the engine, for GetTeacherInfo."""
    return f"vllm {vllm_api.installed_version()}"


class _VllmEngine:
    def __init__(self, llm: Any, metrics: EngineMetrics | None = None) -> None:
        self._llm: Any = llm
        self._metrics = metrics
        self._request_numbers = itertools.count()

    @property
    def dead(self) -> bool:
        """As `Engine.dead`."""
        # `errored` turns true when the engine's process ends; nobody has to ask it something for that.
        return self._llm is None or bool(self._llm.errored)

    @property
    def max_model_len(self) -> int:
        """As `Engine.max_model_len`."""
        return int(self._llm.vllm_config.model_config.max_model_len)

    def metrics(self) -> Iterable[Metric]:
        """As `Engine.metrics`."""
        return self._metrics.collect() if self._metrics else ()

    def shutdown(self) -> None:
        """As `Engine.shutdown`."""
        llm, self._llm = self._llm, None
        llm.shutdown(timeout=_SHUTDOWN_SECONDS)

    def _identity(self, adapter: Adapter | None) -> dict[str, Any]:
        """What a request to vLLM carries besides tokens and parameters."""
        lora = None if adapter is None else vllm_api.LoRARequest(adapter.name, adapter.number, str(adapter.folder))
        return {"request_id": str(next(self._request_numbers)), "lora_request": lora}


class VllmScoringEngine(_VllmEngine):
    """A `ScoringEngine`."""

    @property
    def block_tokens(self) -> int:
        """As `ScoringEngine.block_tokens`."""
        cache = self._llm.vllm_config.cache_config
        return int(cache.block_size) if cache.enable_prefix_caching else 0

    @property
    def cache_tokens(self) -> int:
        """As `ScoringEngine.cache_tokens`."""
        cache = self._llm.vllm_config.cache_config
        return int(cache.block_size * cache.num_gpu_blocks)

    @property
    def batch_tokens(self) -> int:
        """As `ScoringEngine.batch_tokens`."""
        return int(self._llm.vllm_config.scheduler_config.max_num_batched_tokens)

    async def hidden_states(
        self, token_ids: Sequence[int], first: int = 0, salt: str = "", adapter: Adapter | None = None
    ) -> ComputedStates:
        """As `ScoringEngine.hidden_states`; with an adapter, of the model that has it."""
        tokens, computed = len(token_ids), 0
        # Without reading, where the cache reaches further than the first state that is wanted.
        for reading in (first > 0, *[False] * _ATTEMPTS):
            states, cached = await self._encode(token_ids, salt, adapter, reading=reading)
            computed += tokens - cached
            # When vLLM preempts a prompt that it has computed in part, it keeps those states and appends what it then
            # computes again (`AllPool.forward`): too many, and nobody can say which is whose.
            if cached <= first and len(states) == tokens - cached:
                return ComputedStates(states, cached, computed)
        raise TutelageError(f"the engine gave {len(states)} states for {tokens} tokens, {_ATTEMPTS} times")

    async def _encode(
        self, token_ids: Sequence[int], salt: str, adapter: Adapter | None, *, reading: bool
    ) -> tuple[torch.Tensor, int]:
        """States after the tokens that were computed, and how many before them were read from the cache."""
        outputs = self._llm.encode(
            vllm_api.tokens_input(list(token_ids), cache_salt=salt or None),
            vllm_api.PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=not reading),
            **self._identity(adapter),
        )
        try:
            # Closing aborts the request in vLLM, if this is cancelled before the end.
            async with aclosing(outputs):
                async for output in outputs:
                    states: torch.Tensor = output.outputs.data
                    cached: int = output.num_cached_tokens
        except vllm_api.EngineDeadError as error:
            raise Unreachable(_DEAD.format("scoring")) from error
        return states, cached


class VllmGenerationEngine(_VllmEngine):
    """A `GenerationEngine`."""

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: Sampling, adapter: Adapter | None = None
    ) -> AsyncGenerator[CompletionDelta]:
        """As `GenerationEngine.generate`; with an adapter, by the model that has it."""
        parameters = vllm_api.SamplingParams(
            n=sampling.samples,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            output_kind=vllm_api.RequestOutputKind.DELTA,  # by default every output holds all tokens so far once more
        )
        outputs = self._llm.generate(
            vllm_api.tokens_input(list(prompt_token_ids)), parameters, **self._identity(adapter)
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    for piece in output.outputs:
                        yield CompletionDelta(piece.index, piece.token_ids, piece.text, piece.finish_reason or "")
        except vllm_api.EngineDeadError as error:
            raise Unreachable(_DEAD.format("generating")) from error


class _LoraEngine:
    """An engine's model with an adapter; the engine itself belongs to the base."""

    def __init__(self, engine: Any, adapter: Adapter) -> None:
        self._engine, self._adapter = engine, adapter

    @property
    def dead(self) -> bool:
        """As `Engine.dead`."""
        return bool(self._engine.dead)

    @property
    def max_model_len(self) -> int:
        """As `Engine.max_model_len`."""
        return int(self._engine.max_model_len)

    def metrics(self) -> Iterable[Metric]:
        """As `Engine.metrics`; what the base has."""
        metrics: Iterable[Metric] = self._engine.metrics()
        return metrics

    def shutdown(self) -> None:
        """As `Engine.shutdown`."""
        self._engine.shutdown()


class LoraScoringEngine(_LoraEngine):
    """A `ScoringEngine`."""

    @property
    def block_tokens(self) -> int:
        """As `ScoringEngine.block_tokens`."""
        return int(self._engine.block_tokens)

    @property
    def cache_tokens(self) -> int:
        """As `ScoringEngine.cache_tokens`."""
        return int(self._engine.cache_tokens)

    @property
    def batch_tokens(self) -> int:
        """As `ScoringEngine.batch_tokens`."""
        return int(self._engine.batch_tokens)

    async def hidden_states(self, token_ids: Sequence[int], first: int = 0, salt: str = "") -> ComputedStates:
        """As `ScoringEngine.hidden_states`."""
        states: ComputedStates = await self._engine.hidden_states(token_ids, first, salt, self._adapter)
        return states


class LoraGenerationEngine(_LoraEngine):
    """A `GenerationEngine`."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[CompletionDelta]:
        """As `GenerationEngine.generate`."""
        pieces: AsyncGenerator[CompletionDelta] = self._engine.generate(prompt_token_ids, sampling, self._adapter)
        return pieces
