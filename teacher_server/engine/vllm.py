"""Scoring and writing on vLLM's asynchronous engine, through its public interface alone.

Scoring runs the pooling runner, which returns the final hidden state of every token. Chunked prefill and
prefix caching are off: with either, states of tokens that were computed earlier would be missing.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tutelage.errors import ConfigurationError, Unreachable
from tutelage.teacher_server.config import Role, TeacherConfig
from tutelage.teacher_server.engine.base import CompletionDelta, Engine, Sampling
from tutelage.teacher_server.engine.lora_adapters import Adapter, lora_rank, read_adapters
from tutelage.teacher_server.engine.replicas import Replicas

if TYPE_CHECKING:
    import torch

_SPAWN_CHECK_SECONDS = 0.05
# An engine has nothing to save; then it is killed.
_SHUTDOWN_SECONDS = 1.0
_DEAD = "the teacher's engine is dead; the server is exiting"


def prepare_environment(config: TeacherConfig) -> None:
    """Sets what torch, vLLM and its children read from the environment; to be called before either is used."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # matrices in pages of 2 MiB, which Linux gives to who asks
    os.environ["VLLM_LOGGING_LEVEL"] = config.engine_log_level
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.engine_log_level == "ERROR":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")


def cores_of(role: Role, config: TeacherConfig, cores: Sequence[int]) -> list[int]:
    """The cores that an engine computes on, of those that this process may use.

    Each of two roles gets half. One alone leaves the last to the front end, or as many as the head has threads, unless
    several engines share them all with the head.

    Raises:
        ConfigurationError: the configuration names a core that this process may not use.

    """
    wanted = config.score_cores if role == "score" else config.write_cores
    if wanted != "auto":
        named = _numbers(wanted)
        if not set(named) <= set(cores):
            raise ConfigurationError(f"given {wanted}, allowed: of {list(cores)}", f"{role}_cores")
        return named
    if len(config.roles) == 1:
        if role == "score" and config.score_engines > 1:
            return list(cores)
        spare = config.head_threads if role == "score" else 1
        return list(cores[:-spare] or cores[:1])
    half = max(1, len(cores) // 2)
    return list(cores[:half] if role == config.roles[0] else cores[half:] or cores)


def shares_of(cores: Sequence[int], engines: int) -> list[list[int]]:
    """The cores of each of several engines, neighbours together, as equal as they can be.

    Raises:
        ConfigurationError: there are more engines than cores.

    """
    if engines > len(cores):
        raise ConfigurationError(f"given {engines}, allowed: 1 to {len(cores)}, a core for each", "score_engines")
    bounds = [number * len(cores) // engines for number in range(engines + 1)]
    return [list(cores[start:end]) for start, end in itertools.pairwise(bounds)]


def _numbers(ranges: str) -> list[int]:
    """The numbers of "0-2,5": 0, 1, 2, 5."""
    bounds = [part.split("-") for part in ranges.split(",")]
    return [number for bound in bounds for number in range(int(bound[0]), int(bound[-1]) + 1)]


def start_engines(checkpoint: Path, config: TeacherConfig, max_model_len: int) -> dict[Role, Engine]:
    """Starts the engines of all roles side by side and waits until their models are loaded (tens of seconds).

    Raises:
        ConfigurationError: vLLM does not start with this configuration.

    """
    from vllm.platforms import current_platform

    if config.score_engines > 1 and not current_platform.is_cpu():
        message = f"given {config.score_engines}, allowed: 1, except on a CPU; start a teacher on each device instead"
        raise ConfigurationError(message, "score_engines")
    wanted: list[tuple[Role, list[int]]] = []
    for role in config.roles:
        cores = cores_of(role, config, sorted(os.sched_getaffinity(0)))
        wanted += [(role, share) for share in shares_of(cores, config.score_engines if role == "score" else 1)]
    with ThreadPoolExecutor(len(wanted), thread_name_prefix="start-engine") as threads:
        starting = []
        for role, share in wanted:
            spawned = len(multiprocessing.active_children())
            starting.append(threads.submit(_start, role, checkpoint, config, max_model_len, share))
            # vLLM configures itself through globals and the environment: one process is spawned after the other.
            while not starting[-1].done() and len(multiprocessing.active_children()) == spawned:
                time.sleep(_SPAWN_CHECK_SECONDS)
        engines = [engine.result() for engine in starting]
    if current_platform.is_cpu():
        keep_off({core for _, share in wanted for core in share})
    started: dict[Role, Engine] = {}
    for role in config.roles:
        own = [engine for (of_role, _), engine in zip(wanted, engines, strict=True) if of_role == role]
        started[role] = Replicas(own) if role == "score" else own[0]
    return started


def keep_off(engines: set[int]) -> None:
    """Moves this process's threads, and all that they will start, to the cores that no engine computes on, if any.

    An engine on a CPU waits at every layer for its slowest core, so work beside it on one costs all of them.
    """
    free = os.sched_getaffinity(0) - engines
    if not free:
        return
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread.id, free)


def _start(
    role: Role, checkpoint: Path, config: TeacherConfig, max_model_len: int, cores: Sequence[int]
) -> VllmScoringEngine | VllmGenerationEngine:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if current_platform.is_cpu():
        os.sched_setaffinity(0, cores)  # of this thread, and so of the process that it spawns for the engine
    try:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(checkpoint),
                dtype=config.dtype,
                max_model_len=max_model_len,
                max_num_batched_tokens=max(config.batched_tokens, max_model_len),
                max_num_seqs=config.max_num_seqs,
                kv_cache_memory_bytes=config.kv_cache_memory_bytes,
                enforce_eager=config.enforce_eager,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                # On a CPU vLLM would add a worker's process, and spin on a core of the others while it waits for it.
                distributed_executor_backend=UniProcExecutor,
                **(scoring_arguments() if role == "score" else {}),
                **_adapter_arguments(config),
            )
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"vLLM does not start an engine to {role} with this configuration: {error}") from error
    return VllmScoringEngine(llm) if role == "score" else VllmGenerationEngine(llm)


def scoring_arguments() -> dict[str, Any]:
    """What makes a vLLM engine one that answers with the final hidden state of every token, at once for a sequence."""
    from vllm.config import PoolerConfig

    return {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "hf_overrides": {"head_dtype": "model"},  # else states travel as float32: the same numbers, twice the bytes
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }


def _adapter_arguments(config: TeacherConfig) -> dict[str, Any]:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    adapters = read_adapters(config)
    if not adapters:
        return {}
    rank = lora_rank(adapters, get_args(MaxLoRARanks))
    return {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}


def version() -> str:
    """Name and version of the engine, for GetTeacherInfo."""
    import vllm

    return f"vllm {vllm.__version__}"


class _VllmEngine:
    def __init__(self, llm: Any) -> None:
        self._llm: Any = llm
        self._request_numbers = itertools.count()

    @property
    def dead(self) -> bool:
        """As `Engine.dead`."""
        return self._llm is None or bool(self._llm.errored)

    def shutdown(self) -> None:
        """As `Engine.shutdown`."""
        llm, self._llm = self._llm, None
        llm.shutdown(timeout=_SHUTDOWN_SECONDS)
        # It is part of a cycle, and its destructor fails when it runs at the end of the interpreter.
        del llm
        gc.collect()

    def _next_id(self) -> str:
        return str(next(self._request_numbers))


def _lora_request(adapter: Adapter | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if adapter is None else LoRARequest(adapter.name, adapter.number, str(adapter.folder))


class VllmScoringEngine(_VllmEngine):
    """A `ScoringEngine`."""

    async def hidden_states(self, token_ids: Sequence[int], adapter: Adapter | None = None) -> torch.Tensor:
        """As `ScoringEngine.hidden_states`; with an adapter, of the model that has it."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        outputs = self._llm.encode(
            tokens_input(list(token_ids)),
            PoolingParams(task="token_embed", use_activation=False),
            self._next_id(),
            lora_request=_lora_request(adapter),
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    hidden: torch.Tensor = output.outputs.data
        except EngineDeadError as error:
            raise Unreachable(_DEAD) from error
        return hidden


class VllmGenerationEngine(_VllmEngine):
    """A `GenerationEngine`."""

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: Sampling, adapter: Adapter | None = None
    ) -> AsyncGenerator[CompletionDelta]:
        """As `GenerationEngine.generate`; with an adapter, by the model that has it."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = SamplingParams(
            n=sampling.samples,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self._llm.generate(
            tokens_input(list(prompt_token_ids)), parameters, self._next_id(), lora_request=_lora_request(adapter)
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    for piece in output.outputs:
                        yield CompletionDelta(piece.index, piece.token_ids, piece.text, piece.finish_reason or "")
        except EngineDeadError as error:
            raise Unreachable(_DEAD) from error


class _Adapted:
    """An engine's model with an adapter; the engine itself belongs to the base."""

    def __init__(self, engine: Any, adapter: Adapter) -> None:
        self._engine, self._adapter = engine, adapter

    @property
    def dead(self) -> bool:
        """As `Engine.dead`."""
        return bool(self._engine.dead)

    def shutdown(self) -> None:
        """As `Engine.shutdown`."""
        self._engine.shutdown()


class LoraScoringEngine(_Adapted):
    """A `ScoringEngine`."""

    async def hidden_states(self, token_ids: Sequence[int]) -> torch.Tensor:
        """As `ScoringEngine.hidden_states`."""
        states: torch.Tensor = await self._engine.hidden_states(token_ids, self._adapter)
        return states


class LoraGenerationEngine(_Adapted):
    """A `GenerationEngine`."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[CompletionDelta]:
        """As `GenerationEngine.generate`."""
        pieces: AsyncGenerator[CompletionDelta] = self._engine.generate(prompt_token_ids, sampling, self._adapter)
        return pieces
