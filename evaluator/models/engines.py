"""Engines that write and score token ids: `transformers` for both, `vllm` for writing.

What an engine returns for a sequence depends on that sequence, its seed and, through rounding, on what shares
its batch; the evaluator therefore cuts batches the same way every time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from tutelage.errors import CheckpointError, ConfigurationError, Unreachable

EngineName = Literal["transformers", "vllm"]
Dtype = Literal["bfloat16", "float16", "float32"]
_BLOCK_TOKENS = 32  # small enough for the prefix cache to find a template's header
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How to write.

    Attributes:
        temperature: 0 takes the likeliest token, T > 0 samples from softmax(logits / T).
        max_new_tokens: at most so many tokens, the end-of-sequence token included.

    """

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Writing:
    """What was written after a prompt; `finish_reason` is "stop" or "length"."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ScoringGroup:
    """Continuations of one context, all as token ids, none empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Engine(Protocol):
    """A checkpoint that writes and scores."""

    @property
    def name(self) -> str:
        """For the rows."""
        ...

    @property
    def dtype(self) -> str:
        """Arithmetic of the model, for the rows."""
        ...

    @property
    def max_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        ...

    @property
    def batch_items(self) -> int:
        """Items that are handed over together, and durable together."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, as transformers loads it."""
        ...

    def write(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Writing]:
        """One answer a prompt; `seeds` decide the samples, one a prompt."""
        ...

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """Sum of log-probabilities of each continuation given its context, group by group."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


def open_engine(name: EngineName, checkpoint: Path, *, dtype: Dtype, batch_items: int) -> Engine:
    """Loads a checkpoint.

    Raises:
        CheckpointError: it does not load.

    """
    kind: type[VllmEngine] | type[TransformersEngine] = VllmEngine if name == "vllm" else TransformersEngine
    started = time.perf_counter()
    try:
        engine = kind(checkpoint, dtype=dtype, batch_items=batch_items)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not load as a causal language model: {error}") from error
    _logger.info("loaded %s with %s in %.1f s", checkpoint, name, time.perf_counter() - started)
    return engine


class TransformersEngine:
    """Writes in batches with a shared cache (evaluator.decoding); scores packed token trees without padding."""

    name = "transformers"

    def __init__(self, checkpoint: Path, *, dtype: Dtype, batch_items: int, pack_tokens: int = 512) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from tutelage.evaluator.models.decoding import ATTENTION

        transformers_logging.disable_progress_bar()
        self.dtype, self.batch_items, self._pack_tokens = dtype, batch_items, pack_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation=ATTENTION, use_safetensors=True
        )
        self._model = model.to(self._device).eval()
        self.max_tokens = int(model.config.max_position_embeddings)
        self._end_ids = _end_ids(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)

    def write(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Writing]:
        """See `Engine.write`."""
        import torch

        from tutelage.evaluator.models.decoding import decode

        with torch.inference_mode():
            written = decode(
                self._model,
                prompts,
                [torch.Generator(self._device).manual_seed(seed) for seed in seeds],
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
                end_ids=self._end_ids,
            )
        return [self._writing(ids) for ids in written]

    def _writing(self, ids: list[int]) -> Writing:
        finish_reason = "stop" if ids[-1] in self._end_ids else "length"
        return Writing(self.tokenizer.decode(ids, skip_special_tokens=True), len(ids), finish_reason)

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """See `Engine.score`."""
        import torch

        scores: list[list[float]] = []
        with torch.inference_mode():
            for pack in _packs(groups, self._pack_tokens):
                scores += self._score_pack(pack)
        return scores

    def _score_pack(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """All groups in one row: a context is computed once, its continuations each see it and themselves.

        Position ids start anew with each group, and each continuation's follow its context's.
        """
        import torch

        layout = _Layout(groups)
        size = len(layout.ids)
        index = torch.arange(size, device=self._device)
        group, branch = (torch.tensor(values, device=self._device) for values in (layout.group, layout.branch))
        same_branch = (branch[:, None] == branch[None, :]) | (branch[None, :] == 0)
        visible = (index[:, None] >= index[None, :]) & (group[:, None] == group[None, :]) & same_branch
        dtype = self._model.dtype
        mask = torch.zeros(size, size, dtype=dtype, device=self._device).masked_fill(~visible, torch.finfo(dtype).min)
        logits_NV = self._model(
            input_ids=torch.tensor([layout.ids], device=self._device),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([layout.positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(layout.predictors, device=self._device),
        ).logits[0]
        targets_N1 = torch.tensor(layout.targets, device=self._device)[:, None]
        logp_N = torch.log_softmax(logits_NV.float(), dim=-1).gather(1, targets_N1)[:, 0]
        sums = iter([float(part.sum()) for part in logp_N.split(layout.lengths)])
        return [[next(sums) for _ in group.continuations] for group in groups]

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model


def _end_ids(configured: int | list[int] | None, tokenizers: int | None) -> frozenset[int]:
    configured = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return frozenset([*configured, *([tokenizers] if tokenizers is not None else [])])


class _Layout:
    """Where each token of a pack stands; the last token of a continuation is a target but no input.

    `branch` is 0 in a context and counts the continuations of the group from 1.
    """

    def __init__(self, groups: Sequence[ScoringGroup]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.group: list[int] = []
        self.branch: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.lengths: list[int] = []
        for number, group in enumerate(groups):
            self._append(group.context, 0, number, 0)
            end_of_context = len(self.ids) - 1
            for branch, continuation in enumerate(group.continuations, start=1):
                first = len(self.ids)
                self._append(continuation[:-1], len(group.context), number, branch)
                self.predictors += [end_of_context, *range(first, len(self.ids))]
                self.targets += continuation
                self.lengths.append(len(continuation))

    def _append(self, ids: Sequence[int], position: int, group: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.group += [group] * len(ids)
        self.branch += [branch] * len(ids)


def _packs(groups: Sequence[ScoringGroup], limit: int) -> list[list[ScoringGroup]]:
    """Groups in order, cut so that a pack has at most `limit` tokens (a larger group is a pack of its own)."""
    packs: list[list[ScoringGroup]] = []
    room = 0
    for group in groups:
        size = len(group.context) + sum(len(continuation) - 1 for continuation in group.continuations)
        if not packs or size > room:
            packs.append([])
            room = limit
        packs[-1].append(group)
        room -= size
    return packs


def _prepare_vllm() -> None:
    """What vLLM reads from the environment when it is imported; what is set there already stays."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Of its CPU build: by default it leaves a core to a front end, which here only waits.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


class VllmEngine:
    """Writes with vLLM's offline engine; scores with transformers. Each is opened when it is first needed.

    vLLM's prompt log-probabilities are not used: they are slow and leave no way to share a context.
    """

    name = "vllm"

    def __init__(self, checkpoint: Path, *, dtype: Dtype, batch_items: int) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if find_spec("vllm") is None:
            raise ConfigurationError("vllm is not installed here; install it, or use transformers", "engine")
        self.dtype, self.batch_items, self._checkpoint = dtype, batch_items, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.max_tokens = int(AutoConfig.from_pretrained(checkpoint).max_position_embeddings)

    @cached_property
    def _llm(self) -> Any:
        _prepare_vllm()
        from vllm import LLM

        try:
            # Compiling costs minutes at the first start and is paid back by no evaluation of this size.
            return LLM(
                str(self._checkpoint),
                dtype=self.dtype,
                enforce_eager=True,
                max_num_seqs=self.batch_items,
                block_size=_BLOCK_TOKENS,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"vLLM does not start with {self._checkpoint}: {error}; use the engine transformers", "engine"
            ) from error

    @cached_property
    def _scorer(self) -> TransformersEngine:
        return TransformersEngine(self._checkpoint, dtype=self.dtype, batch_items=self.batch_items)

    def write(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Writing]:
        """See `Engine.write`.

        Raises:
            Unreachable: vLLM's own process has ended, which is no item's fault.

        """
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = [
            SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=seed)
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            # It begins when it has them all: what a batch holds moves roundings, and so must not be a matter of time.
            self._llm.sleep(level=0, mode="keep")
            self._llm.enqueue(inputs, parameters, use_tqdm=False)
            self._llm.wake_up(tags=["scheduling"])
            outputs = self._llm.wait_for_completion(use_tqdm=False)
        except EngineDeadError as error:
            raise Unreachable(
                "vLLM's process ended while it wrote (its log says why, often memory); evaluate again", "engine"
            ) from error
        written = [output.outputs[0] for output in outputs]
        return [Writing(one.text, len(one.token_ids), str(one.finish_reason)) for one in written]

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """See `Engine.score`."""
        return self._scorer.score(groups)

    def close(self) -> None:
        """See `Engine.close`."""
        if "_llm" in self.__dict__:
            self._llm.llm_engine.engine_core.shutdown()
        self.__dict__.pop("_scorer", None)
