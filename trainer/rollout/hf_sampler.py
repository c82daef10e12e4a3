"""Live sampling: the student writes continuations with the weights that it has now.

Here with its own transformers model; with vLLM in `trainer/rollout/vllm_sampler.py`. Prompts are padded on the left;
sequences that have ended leave the batch, so it grows cheaper as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import derived_seed
from tutelage.trainer.data.sequences import TokenIds
from tutelage.trainer.model.student import Student


class TransformersSampler:
    """A `Sampler` that uses the very model that is trained."""

    def __init__(self, config: StudentConfig, student: Student) -> None:
        self._config, self._student = config, student

    def generate(self, step: int, batch_indices: Sequence[int], prompts: Sequence[TokenIds]) -> list[TokenIds]:
        """As `Sampler.generate`."""
        config, model = self._config, self._student.model
        seeds = [derived_seed(config.seed, "sampling", config.id, step, batch_index) for batch_index in batch_indices]
        model.eval()
        completions = sample(
            model,
            prompts,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_new_tokens=config.sampling.max_new_tokens,
            max_tokens=config.batch.max_tokens,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            end_ids=self._student.end_ids,
            vocabulary_size=self._student.vocabulary_size,
        )
        model.train()
        return completions


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[TokenIds],
    *,
    generators: Sequence[torch.Generator],
    max_new_tokens: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    end_ids: frozenset[int],
    vocabulary_size: int,
) -> list[TokenIds]:
    """One continuation a prompt; it ends with an end token unless it was cut off.

    Args:
        model: a transformers causal language model.
        prompts: token ids, none empty.
        generators: on the CPU, one for each prompt; the only sources of randomness.
        max_new_tokens: tokens to write at most.
        max_tokens: prompt and continuation together at most.
        temperature: of the sampling; > 0.
        top_p: nucleus mass, in (0, 1].
        end_ids: tokens that end a continuation.
        vocabulary_size: ids from here on (padded rows of the head) are never written.

    """
    room = [min(max_new_tokens, max_tokens - len(prompt)) for prompt in prompts]

    def next_ids(ids_BT: Tensor, mask_BT: Tensor, cache: Any, active: Sequence[int]) -> Tensor:
        logits_BV = _next_logits(model, ids_BT, mask_BT, cache)[:, :vocabulary_size]
        return choose(logits_BV, [generators[row] for row in active], temperature=temperature, top_p=top_p)

    return _write(model, prompts, room, end_ids, next_ids)


def _write(
    model: Any,
    prompts: Sequence[TokenIds],
    room: Sequence[int],
    end_ids: frozenset[int],
    next_ids: Callable[[Tensor, Tensor, Any, Sequence[int]], Tensor],
) -> list[TokenIds]:
    """Writes token by token; `room` bounds the tokens of each sequence, `next_ids` is told which still go on."""
    from transformers import DynamicCache

    written: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    ids_BT, mask_BT = (tensor.to(model.device) for tensor in _left_padded(prompts))
    cache = DynamicCache(config=model.config)
    while active:
        chosen_B = next_ids(ids_BT, mask_BT, cache, active)
        for row, token in zip(active, chosen_B.tolist(), strict=True):
            written[row].append(token)
        going = [
            batch_index
            for batch_index, row in enumerate(active)
            if written[row][-1] not in end_ids and len(written[row]) < room[row]
        ]
        ids_BT, mask_BT = chosen_B[:, None], torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], dim=1)
        if len(going) < len(active):
            kept = torch.tensor(going, dtype=torch.long, device=model.device)
            ids_BT, mask_BT = ids_BT[kept], mask_BT[kept]
            cache.batch_select_indices(kept)
            active = [active[batch_index] for batch_index in going]
    return [np.asarray(tokens, np.int32) for tokens in written]


def choose(logits_BV: Tensor, generators: Sequence[torch.Generator], *, temperature: float, top_p: float) -> Tensor:
    """One id a row, int64 [B], drawn from softmax(logits / temperature) within its nucleus.

    Inverts the cumulative distribution with one uniform number a row, of the row's own generator; `torch.multinomial`
    draws one per vocabulary id, which on a CPU takes longer than the head of a small model.
    """
    scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    probabilities_BV = torch.softmax(scaled_BV, dim=-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        probabilities_BV = probabilities_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    cumulative_BV = probabilities_BV.cumsum(-1)
    uniform_B1 = torch.cat([torch.rand(1, 1, generator=own) for own in generators]).to(logits_BV.device)
    # right=True steps over ids of probability 0, whose cumulative value equals their left neighbour's.
    index_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    return index_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


def _left_padded(prompts: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T]; padding is id 0, which the mask hides."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT, mask_BT


def _next_logits(model: Any, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
    """Logits [B, V] after the newest token; the cache takes the new keys and values in."""
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=position_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BV: Tensor = output.logits[:, -1]
    return logits_BV
