"""Generates in batches with a shared cache; log-likelihoods of packed contexts without padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutelage.evaluator.config import Dtype
from tutelage.evaluator.models.base import Generation, Sampling, ScoringGroup
from tutelage.evaluator.models.packing import Layout, packs


class TransformersEngine:
    """An `Engine` with a transformers model."""

    name = "transformers"

    def __init__(self, checkpoint: Path, *, dtype: Dtype, batch_size: int, pack_tokens: int = 512) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from tutelage.evaluator.models.decoding import ATTENTION

        transformers_logging.disable_progress_bar()
        self.dtype, self.batch_size, self._pack_tokens = dtype, batch_size, pack_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation=ATTENTION, use_safetensors=True
        )
        self._model = model.to(self._device).eval()
        self.max_tokens = int(model.config.max_position_embeddings)
        configured = model.generation_config.eos_token_id  # None, one id, or several
        ends = [*(configured if isinstance(configured, list) else [configured]), self.tokenizer.eos_token_id]
        self._end_ids = frozenset(end for end in ends if end is not None)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`."""
        import torch

        from tutelage.evaluator.models.decoding import decode

        with torch.inference_mode():
            completions = decode(
                self._model,
                prompts,
                [torch.Generator(self._device).manual_seed(seed) for seed in seeds],
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
                end_ids=self._end_ids,
            )
        return [
            Generation(
                self.tokenizer.decode(ids, skip_special_tokens=True),
                len(ids),
                "stop" if ids[-1] in self._end_ids else "length",
            )
            for ids in completions
        ]

    def loglikelihood(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """See `Engine.loglikelihood`."""
        import torch

        scores: list[list[float]] = []
        with torch.inference_mode():
            for pack in packs(groups, self._pack_tokens):
                scores += self._loglikelihood_of_pack(pack)
        return scores

    def _loglikelihood_of_pack(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """All groups in one row: a context is computed once, its continuations each see it and themselves."""
        import torch

        layout = Layout(groups)
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
        logits_NV = self._model(
            input_ids=torch.tensor([layout.ids], device=self._device),
            attention_mask=mask_TT[None, None],
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
