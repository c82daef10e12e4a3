"""Live sampling with vLLM in the student's own process; its weights are replaced in place before each step's sampling.

vLLM computes with a copy of the weights, fused and packed its way. `reload_weights` makes that copy anew from the
student's tensors, which are handed over by reference, so a sample is always of the weights of its step. Nothing else
outlives a step: prefix caching is off, and every sequence has a seed of its own.

The engine starts with random weights. What it then finds likeliest after the first refresh is compared with what the
student does, so a model whose weights do not all arrive is refused at start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.data.hub import local_model
from tutelage.decoding import PIECE_TOKENS
from tutelage.errors import ConfigurationError
from tutelage.runtime import vllm_api
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.model.lora import merged_weights
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import OnPiece, done
from tutelage.trainer.rollout.hf_sampler import sampling_seed
from tutelage.trainer.rollout.student_copy import CANARY_TOKENS, StudentCopy, canary, canary_ids

_PROBED = 20
# bfloat16 logits of two engines differ by a few tenths at most; those of a model that lacks a tensor by more than one.
_TOLERANCE_NATS = 0.5
# Of the key-value cache; none of vLLM's own is larger.
_BATCHED_TOKENS = 4096  # vLLM's own for a CPU
_BLOCK_TOKENS = 128


class VllmSampler:
    """A `Sampler` that writes with vLLM.

    Args:
        config: the student's.
        student: whose weights are taken.

    Raises:
        ConfigurationError: vLLM is not installed, does not start with this model, or does not compute it.

    """

    def __init__(self, config: StudentConfig, student: Student | StudentCopy) -> None:
        vllm_api.require_vllm("sampling.engine", "use transformers")
        self._config, self._student = config, student
        try:
            self._llm = _start(config, _cache_bytes_a_token(student))
            self.refresh()
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"vLLM does not start with this student: {error}; use transformers", "sampling.engine"
            ) from error
        self.require_same(canary(student.model, student.vocabulary_size))

    def write(
        self,
        step: int,
        indices: Sequence[int],
        prompts: Sequence[TokenIds],
        *,
        turn: int = 0,
        on_piece: OnPiece | None = None,
    ) -> Future[list[Completion]]:
        """As `Sampler.write`."""
        if not self._has_present_weights:
            self.refresh()
        settings = [
            request_settings(
                self._config,
                self._student,
                seed=sampling_seed(self._config, step, index, turn),
                prompt_tokens=len(prompt),
            )
            for index, prompt in zip(indices, prompts, strict=True)
        ]
        ids: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        for row, output in self._generate([prompt.tolist() for prompt in prompts], settings):
            ids[row] += output.token_ids
            logps[row] += output.logprobs.logprobs
            if on_piece is not None:
                on_piece(indices[row], np.array(ids[row], np.int32))
        both = zip(ids, logps, strict=True)
        return done([Completion(np.array(one, np.int32), np.array(logp, np.float32)) for one, logp in both])

    def take_weights(self, version: int) -> None:
        """Before the next batch is begun, if there is one."""
        self._has_present_weights = False

    def close(self) -> None:
        """The engine ends with the process."""

    def _generate(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """What vLLM adds to each prompt, a few tokens at a time, with the prompt's number."""
        engine = self._llm.llm_engine
        for row, (prompt, values) in enumerate(zip(prompts, settings, strict=True)):
            parameters = vllm_api.SamplingParams(**values, output_kind=vllm_api.RequestOutputKind.DELTA)
            engine.add_request(str(row), vllm_api.tokens_input(prompt_token_ids=list(prompt)), parameters)
        while engine.has_unfinished_requests():
            for result in engine.step():
                yield int(result.request_id), result.outputs[0]

    def refresh(self) -> None:
        """Gives the engine the student's present weights."""
        # Tied weights under each of their names, since vLLM packs each of them apart.
        weights = merged_weights(self._student.model)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._has_present_weights = True

    def require_same(self, logp_V: npt.NDArray[np.float32]) -> None:
        """Refuses an engine that finds other tokens likeliest than the student.

        Args:
            logp_V: as `canary` of the student.

        Raises:
            ConfigurationError: says by how much, and how much is allowed.

        """
        if not self._has_present_weights:
            self.refresh()
        settings = {"max_tokens": 1, "logprobs": _PROBED, "seed": 0, "detokenize": False}
        prompt = canary_ids(self._student.model, self._student.vocabulary_size)
        ((_, output),) = self._generate([prompt], [settings])
        found = {token: one.logprob for token, one in output.logprobs[0].items()}
        difference = max(abs(logp - float(logp_V[token])) for token, logp in found.items())
        if difference > _TOLERANCE_NATS:
            raise ConfigurationError(
                f"vLLM's log-probabilities are {difference:.2f} from the student's, allowed is {_TOLERANCE_NATS}: it "
                "computes this model otherwise, or not all weights reach it; use transformers",
                "sampling.engine",
            )


def request_settings(
    config: StudentConfig, student: Student | StudentCopy, *, seed: int, prompt_tokens: int
) -> dict[str, Any]:
    """What vLLM is told about one sequence.

    Args:
        config: the student's.
        student: whose end tokens and vocabulary count.
        seed: of the sequence.
        prompt_tokens: of its prompt.

    """
    size = student.vocabulary_size
    padded = student.model.get_output_embeddings().weight.shape[0] > size
    return {
        "max_tokens": min(config.sampling.max_new_tokens, config.batch.max_tokens - prompt_tokens),
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "repetition_penalty": config.sampling.repetition_penalty,
        "seed": seed,
        "logprobs": 0,  # Of the drawn token alone.
        "flat_logprobs": True,
        "stop_token_ids": sorted(student.end_ids),
        # vLLM samples over all rows of the head, of which padding rows are no token.
        "allowed_token_ids": list(range(size)) if padded else None,
        "detokenize": False,
    }


@torch.no_grad()
def _cache_bytes_a_token(student: Student | StudentCopy) -> int:
    """Bytes that a token takes in a key-value cache of the student's dtype."""
    student.model.eval()
    output = student.model(torch.zeros(1, 1, dtype=torch.int64, device=student.device), use_cache=True)
    student.model.train()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)


def _start(config: StudentConfig, cache_bytes_a_token: int) -> Any:
    """An engine in this process, with random weights, for the student's longest batch."""
    # In this process, or `reload_weights` could not take the student's tensors by reference.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    vllm_api.require_conforming()
    longest = max(config.batch.max_tokens, CANARY_TOKENS + 1)
    # One more than are written: vLLM keeps a block for itself.
    cached_tokens = (config.batch.sequences + 1) * (longest + _BLOCK_TOKENS)
    arguments: dict[str, Any] = {}
    dtype = config.dtype
    if config.lora is not None and dtype != "float32":
        # Adapters are merged: below 2⁻⁸ of its weight what they add would be rounded away.
        dtype, cache_bytes_a_token = "float32", 2 * cache_bytes_a_token
    if vllm_api.current_platform.is_cpu():
        # A prompt that is computed in part loses its seed there: vLLM moves the request's generator back (`set_offset`
        # in gpu_model_runner.py), which torch's generators on a CPU cannot, and the engine dies. So a batch has room
        # for every prompt.
        arguments = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_BATCHED_TOKENS, longest)}
    return vllm_api.LLM(
        str(local_model(config.start, "init")),
        load_format="dummy",
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=config.batch.sequences,
        kv_cache_memory_bytes=cached_tokens * cache_bytes_a_token,
        gpu_memory_utilization=0.01,  # Only compared with what is free, since the size of the cache is given.
        enforce_eager=True,  # Compiling takes minutes at the first start.
        enable_prefix_caching=False,  # Keys and values of earlier weights.
        skip_tokenizer_init=True,
        stream_interval=PIECE_TOKENS,  # Of outputs of the kind DELTA alone.
        logprobs_mode="processed_logprobs",  # Of the distribution that is drawn from, after the temperature.
        generation_config="vllm",  # Its own, not the model's: `sampling` alone says how to write.
        **arguments,
    )
