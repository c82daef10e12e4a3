"""Generates in batches with a shared cache; log-likelihoods of packed contexts without padding."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.evaluator.config import Dtype
from tutelage.evaluator.models.base import Generation, Sampling, ScoringGroup
from tutelage.evaluator.models.packing import Layout, packs

_logger = logging.getLogger(__name__)


class TransformersEngine:
    """An `Engine` with a transformers model."""

    name = "transformers"

    def __init__(self, checkpoint: Path, *, dtype: Dtype, batch_size: int, pack_tokens: int = 512) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging as transformers_logging

        from tutelage.evaluator.models.decoding import ATTENTION

        transformers_logging.disable_progress_bar()
        self.dtype, self.batch_size, self._pack_tokens = dtype, batch_size, pack_tokens
        # One device: an evaluation is a process of its own, and a larger model is vLLM's.
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # Said, and not left out: transformers would ask the terminal whether to run a model's own code.
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
        if model.config._attn_implementation == "sdpa":
            # Ours is sdpa for what sdpa computes. A model that needs something else, such as attention sinks or a
            # softcap, says so by another default, and keeps that.
            model.set_attn_implementation(ATTENTION)
        self._model = model.to(self._device).eval()
        self.max_tokens = context_length(model.config)
        generation = model.generation_config
        if (checkpoint / "generation_config.json").exists():  # transformers takes an adapter's from its base model
            generation = GenerationConfig.from_pretrained(checkpoint)
        # Chat models end a turn with another token than a text; generation_config has both, the tokenizer one.
        configured = generation.eos_token_id  # None, one id, or several
        ends = [*(configured if isinstance(configured, list) else [configured]), self.tokenizer.eos_token_id]
        self._end_ids = frozenset(end for end in ends if end is not None)
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._shares_up_to = 0  # tokens of a packed row for which sharing has proved right; see `_may_share`
        self._why_not = ""
        self._decodes = False  # proved at the first answer

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`.

        Raises:
            ConfigurationError: the model keeps its state where transformers' caches are not.

        """
        import torch

        from tutelage.evaluator.models.probes import check_decoding

        with torch.inference_mode():
            if not self._decodes:
                check_decoding(self._model, lambda few: self._decode(few, [0] * len(few), Sampling(0, 3), frozenset()))
                self._decodes = True
            completions = self._decode(prompts, seeds, sampling, self._end_ids)
        return [
            Generation(
                self.tokenizer.decode(ids, skip_special_tokens=True),
                len(ids),
                "stop" if ids[-1] in self._end_ids else "length",
            )
            for ids in completions
        ]

    def _decode(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, end_ids: frozenset[int]
    ) -> list[list[int]]:
        import torch

        from tutelage.decoding import shared_length
        from tutelage.evaluator.models.decoding import decode

        longest = max(map(len, prompts)) + sampling.max_new_tokens
        return decode(
            self._model,
            prompts,
            [torch.Generator(self._device).manual_seed(seed) for seed in seeds],
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            end_ids=end_ids,
            # The probe of `_may_share` costs some forward passes, which is for nothing where nothing is shared.
            share_prefix=shared_length(prompts) > 0 and self._may_share(longest),
        )

    def loglikelihood(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """See `Engine.loglikelihood`; a context is computed once for its continuations where that changes nothing."""
        import torch

        scores: list[list[float]] = []
        with torch.inference_mode():
            for pack in packs(groups, self._pack_tokens):
                layout = Layout(pack)
                scores += self._packed(pack, layout) if self._may_share(len(layout.ids)) else self._plain(pack)
        return scores

    def _may_share(self, tokens: int) -> bool:
        """Whether sharing is right for this model in rows of so many tokens; probed once for each power of two."""
        from tutelage.evaluator.models.probes import reason_not_to_share

        if not self._why_not and tokens > self._shares_up_to:
            size = min(1 << (tokens - 1).bit_length(), self.max_tokens)
            self._why_not = reason_not_to_share(
                self._model, lambda groups: self._packed(groups, Layout(groups)), self._plain, tokens=size
            )
            self._shares_up_to = max(size, tokens)
            if self._why_not:
                _logger.info("choices do not share their contexts, which takes longer: %s", self._why_not)
        return not self._why_not

    def _packed(self, groups: Sequence[ScoringGroup], layout: Layout) -> list[list[float]]:
        """All groups in one row: a context is computed once, its continuations each see it and themselves."""
        import torch

        index_T = torch.arange(len(layout.ids), device=self._device)
        group_T, branch_T = (torch.tensor(values, device=self._device) for values in (layout.group, layout.branch))
        visible_TT = (
            (index_T[:, None] >= index_T[None, :])
            & (group_T[:, None] == group_T[None, :])
            & ((branch_T[:, None] == branch_T[None, :]) | (branch_T[None, :] == 0))
        )
        dtype = self._model.dtype
        # The dtype's least number and not −inf: a row of −inf alone would be NaN.
        mask_TT = torch.zeros_like(visible_TT, dtype=dtype).masked_fill(~visible_TT, torch.finfo(dtype).min)
        logits_NV = self._logits(
            layout.ids,
            layout.predictors,
            attention_mask=mask_TT[None, None],
            position_ids=torch.tensor([layout.positions], device=self._device),
        )
        targets_N1 = torch.tensor(layout.targets, device=self._device)[:, None]
        logp_N = torch.log_softmax(logits_NV.float(), dim=-1).gather(1, targets_N1)[:, 0]
        sums = iter([float(part.sum()) for part in logp_N.split(layout.lengths)])
        return [[next(sums) for _ in group.continuations] for group in groups]

    def _plain(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """A forward pass for each continuation after its context, as the model itself does it."""
        import torch

        scores: list[list[float]] = []
        for group in groups:
            scores.append([])
            for continuation in group.continuations:
                ids = [*group.context, *continuation[:-1]]
                logits_NV = self._logits(ids, list(range(len(group.context) - 1, len(ids))))
                logp_NV = torch.log_softmax(logits_NV.float(), dim=-1)
                targets_N1 = torch.tensor(continuation, device=self._device)[:, None]
                scores[-1].append(float(logp_NV.gather(1, targets_N1).sum()))
        return scores

    def _logits(self, ids: list[int], kept: list[int], **inputs: Any) -> Any:
        """Logits [N, V] at the N kept places of one row."""
        import torch

        kept_N = torch.tensor(kept, device=self._device)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = kept_N
        logits_TV = self._model(input_ids=torch.tensor([ids], device=self._device), use_cache=False, **inputs).logits[0]
        return logits_TV if len(logits_TV) == len(kept) else logits_TV[kept_N]

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model


def context_length(config: Any) -> int:
    """Tokens of the longest sequence that a model reads; without a limit of its own (Mamba, ALiBi), a million."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or 2**20)
