"""Generates with vLLM's offline engine; log-likelihoods come from transformers."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from tutelage.errors import CheckpointError, Terminated, Unreachable
from tutelage.evaluator.config import Dtype
from tutelage.evaluator.models.base import Generation, Sampling, ScoringGroup
from tutelage.evaluator.models.transformers_engine import TransformersEngine, context_length
from tutelage.runtime import vllm_api
from tutelage.runtime.processes import sparing_children_interrupts

# Small enough for the prefix cache, which keeps whole blocks, to find a template's header; vLLM's CPU build has
# blocks of 128 by default, and does not take 16.
_BLOCK_TOKENS = 32
_BATCHED_TOKENS = 4096  # vLLM's own for a CPU


class VllmEngine:
    """An `Engine`; vLLM and the scoring model are each opened when they are first needed.

    vLLM's prompt log-probabilities are not used: they are slow and leave no way to share a context.
    """

    name = "vllm"

    def __init__(self, checkpoint: Path, *, dtype: Dtype, batch_size: int) -> None:
        from transformers import AutoConfig, AutoTokenizer

        vllm_api.require_vllm("engine", "give --engine transformers")
        self.dtype, self.batch_size, self._checkpoint = dtype, batch_size, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        self.max_tokens = context_length(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False))

    @cached_property
    def _llm(self) -> Any:
        cores = sorted(os.sched_getaffinity(0))
        # vLLM and torch read these when they are imported; what is set there already stays.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of its processes; of this one:
        warnings.filterwarnings("ignore", module="vllm")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Of its CPU build: by default it leaves a core to a front end, which here only waits.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        vllm_api.require_conforming()
        arguments: dict[str, Any] = {}
        if vllm_api.current_platform.is_cpu():
            # A prompt that is computed in part loses its seed there: vLLM moves the request's generator back
            # (`set_offset` in gpu_model_runner.py), which torch's generators on a CPU cannot, and the engine dies. So a
            # batch has room for every prompt.
            batched_tokens = max(_BATCHED_TOKENS, self.max_tokens)
            arguments = {"enable_chunked_prefill": False, "max_num_batched_tokens": batched_tokens}
            # One process fewer to start, which a SIGTERM to all of them would end with a traceback.
            arguments["distributed_executor_backend"] = vllm_api.UniProcExecutor
        try:
            # Compiling costs minutes at the first start and is paid back by no evaluation of this size.
            return _started(
                lambda: vllm_api.LLM(
                    str(self._checkpoint),
                    dtype=self.dtype,
                    enforce_eager=True,
                    max_num_seqs=self.batch_size,
                    block_size=_BLOCK_TOKENS,
                    use_tqdm_on_load=False,
                    **arguments,
                )
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"vLLM does not start with {self._checkpoint}: {error}; use the engine transformers", "engine"
            ) from error

    @cached_property
    def _scorer(self) -> TransformersEngine:
        return TransformersEngine(self._checkpoint, dtype=self.dtype, batch_size=self.batch_size)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`.

        Raises:
            Unreachable: vLLM's own process has ended, which is no item's fault.

        """
        parameters = [
            vllm_api.SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=seed)
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            # It begins when it has them all: what a batch holds moves roundings, and so must not be a matter of time.
            self._llm.sleep(level=0, mode="keep")
            self._llm.enqueue(inputs, parameters, use_tqdm=False)
            self._llm.wake_up(tags=["scheduling"])
            outputs = self._llm.wait_for_completion(use_tqdm=False)
        except vllm_api.EngineDeadError as error:
            raise Unreachable(
                "vLLM's process ended while it generated (its log says why, often memory); evaluate again", "engine"
            ) from error
        completions = [output.outputs[0] for output in outputs]
        return [Generation(one.text, len(one.token_ids), str(one.finish_reason)) for one in completions]

    def loglikelihood(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """See `Engine.loglikelihood`."""
        return self._scorer.loglikelihood(groups)

    def close(self) -> None:
        """See `Engine.close`."""
        if "_llm" in self.__dict__:
            self._llm.llm_engine.engine_core.shutdown()
        self.__dict__.pop("_scorer", None)


def _started(make: Callable[[], Any]) -> Any:
    """What `make` starts. An interruption in the meantime ends it at once.

    A thread of its own waits for vLLM's processes: pyzmq's poll, by which it does, loses what signals' handlers raise.
    """
    future: Future[Any] = Future()

    def run() -> None:
        with sparing_children_interrupts():
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)

    Thread(target=run, name="start-vllm", daemon=True).start()
    try:
        return future.result()
    except (KeyboardInterrupt, Terminated):
        for child in multiprocessing.active_children():
            child.kill()
        raise
