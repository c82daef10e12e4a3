"""Decoding with a transformers model in batches whose rows share what they have in common and leave when they end.

What makes it faster than a plain `generate` on the same batch:
- the tokens that all prompts begin with (a template's header) are computed once;
- a row that has ended leaves the batch and its cache;
- the cache grows in place in steps of many tokens, where `DynamicCache` copies all of it for every token;
- while decoding, the query heads that share a key head are its queries, so that no key is repeated.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "tutelage_grouped_sdpa"
_SPARE_TOKENS = 64
_MIN_SHARED_TOKENS = 8


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as views of tensors with room for more tokens."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicLayer.update`; the rows may have changed in number since the last one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: list[torch.Tensor] = []
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        fits = self._rooms and self._rooms[0].shape[0] == len(key_states) and end <= self._rooms[0].shape[-2]
        if not fits:
            self._rooms = [
                _with_room(old, new, end)
                for old, new in zip((self.keys, self.values), (key_states, value_states), strict=True)
            ]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values


def _with_room(old: torch.Tensor, new: torch.Tensor, tokens: int) -> torch.Tensor:
    room = new.new_empty(*new.shape[:2], tokens + _SPARE_TOKENS, new.shape[-1])
    if old.numel():
        room[:, :, : old.shape[-2]] = old
    return room


def _new_cache(model: Any) -> DynamicCache:
    """A cache whose unbounded layers grow in place; layers with a sliding window stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa`; for one position a row, the heads of a group are the queries of their one key head."""
    rows, heads, positions, size = query.shape
    if positions > 1 or heads == key.shape[1]:
        answer: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return answer
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.view(rows, key.shape[1], -1, size), key, value, attn_mask=attention_mask, scale=options["scaling"]
    )
    return mixed.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, _grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def decode(
    model: Any,
    prompts: Sequence[list[int]],
    generators: Sequence[torch.Generator],
    *,
    temperature: float,
    max_new_tokens: int,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """Token ids after each prompt, the end token included.

    Args:
        model: causal language model, loaded with `attn_implementation=ATTENTION`.
        prompts: token ids, none empty.
        generators: one a prompt, on the model's device; each decides its prompt's samples.
        temperature: 0 takes the likeliest token.
        max_new_tokens: at most so many.
        end_ids: tokens that end an answer.

    """
    cache, ids_BT, mask_BT = _shared_prefix(model, prompts)
    position_ids = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    rows = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits_BV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen_B = choose(logits_BV.float(), temperature, [generators[row] for row in rows])
        tokens = chosen_B.tolist()
        for row, token in zip(rows, tokens, strict=True):
            written[row].append(token)
        going = [index for index, token in enumerate(tokens) if token not in end_ids]
        if not going:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=chosen_B.device)
            cache.batch_select_indices(keep)
            rows = [rows[index] for index in going]
            chosen_B, mask_BT, position_ids = chosen_B[keep], mask_BT[keep], position_ids[keep]
        ids_BT = chosen_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return written


def _shared_prefix(model: Any, prompts: Sequence[list[int]]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """A cache with what all prompts begin with; the rest of each, left-padded; the mask of both."""
    cache, shared = _new_cache(model), shared_length(prompts)
    if shared:
        ids = torch.tensor([prompts[0][:shared]], device=model.device)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    rests = [prompt[shared:] for prompt in prompts]
    width = max(map(len, rests))
    ids_BT = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=model.device)
    masks = [[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
    return cache, ids_BT, torch.tensor(masks, device=model.device)


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, at least one left for each; 0 where sharing would not pay."""
    if len(prompts) == 1:
        return 0
    columns = zip(*prompts, strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(shared, min(map(len, prompts)) - 1)
    return shared if shared >= _MIN_SHARED_TOKENS else 0


def choose(logits_BV: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """The next token of each row, sampled from the row's own generator (Gumbel-max) unless greedy."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    uniform_BV = torch.stack(
        [torch.rand(logits_BV.shape[1], generator=generator, device=logits_BV.device) for generator in generators]
    )
    gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
    return (logits_BV / temperature + gumbel_BV).argmax(dim=-1)
