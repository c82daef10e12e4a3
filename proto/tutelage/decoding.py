"""Token-by-token decoding with a transformers model, for the trainer's sampler and the evaluator's engine.

Prompts stand on the right of their row; a sequence that has ended leaves the batch and its cache, so a batch grows
cheaper as it goes. How a token is drawn is the caller's. This is the only shared module that imports torch.

Shapes: see the legend in docs/architecture.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

NextIds = Callable[[Tensor, Sequence[int]], Tensor]
"""From logits [B, V] and the numbers of the prompts that the rows belong to, to one id a row, int64 [B]."""

PIECE_TOKENS = 8
"""Between two calls of `on_piece`."""
_SPARE_TOKENS = 64
_MIN_SHARED_TOKENS = 8


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    next_ids: NextIds,
    room: Sequence[int],
    end_ids: frozenset[int],
    share_prefix: bool = False,
    on_piece: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Token ids after each prompt, the end token included.

    Args:
        model: a transformers causal language model, in evaluation mode.
        prompts: token ids, none empty.
        next_ids: draws the next tokens; nothing else here is random.
        room: tokens of each continuation at most; at least one is always written.
        end_ids: tokens that end a continuation.
        share_prefix: computes the tokens that all prompts begin with once. The padding then stands between them and
            the rest, so it is only for models that count distances by position ids and not by places in the row.
        on_piece: told a prompt's number and all that is written after it, every `PIECE_TOKENS` tokens and at its end.

    """
    cache = growing_cache(model)
    if len(prompts) > 1 and any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        # A recurrent state (Mamba, gated delta nets) cannot be cut to the rows that go on (transformers 5.19), and some
        # models would also read the padding into it: each prompt by itself.
        return [
            decode(
                model,
                [prompt],
                next_ids=lambda logits_BV, rows, row=row: next_ids(logits_BV, [row]),  # type: ignore[misc]
                room=[room[row]],
                end_ids=end_ids,
                on_piece=on_piece and (lambda _row, ids, row=row: on_piece(row, ids)),  # type: ignore[misc]
            )[0]
            for row, prompt in enumerate(prompts)
        ]
    written: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    takes = inspect.signature(model.forward).parameters
    # A prompt that is continued several times is computed once.
    numbers: dict[tuple[int, ...], int] = {}
    number_B = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
    different = list(numbers)
    ids_BT, mask_BT = _left_padded(model, different, cache, shared_length(different) if share_prefix else 0)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    while active:
        # A model without position ids (ALiBi) makes its own from the mask.
        positions = {"position_ids": positions_BT} if "position_ids" in takes else {}
        logits_BV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **positions,
        ).logits[:, -1]
        if len(logits_BV) < len(active):
            number_B = number_B.to(logits_BV.device)
            logits_BV, mask_BT, positions_BT = (each[number_B] for each in (logits_BV, mask_BT, positions_BT))
            cache.batch_select_indices(number_B)
        chosen_B = next_ids(logits_BV, active)
        for row, token in zip(active, chosen_B.tolist(), strict=True):
            written[row].append(token)
        going = [
            index
            for index, row in enumerate(active)
            if written[row][-1] not in end_ids and len(written[row]) < room[row]
        ]
        if on_piece is not None:
            for index, row in enumerate(active):
                if index not in going or len(written[row]) % PIECE_TOKENS == 0:
                    on_piece(row, written[row])
        if len(going) < len(active):
            kept = torch.tensor(going, dtype=torch.long, device=chosen_B.device)
            chosen_B, mask_BT, positions_BT = chosen_B[kept], mask_BT[kept], positions_BT[kept]
            active = [active[index] for index in going]
            if active:
                cache.batch_select_indices(kept)
        ids_BT = chosen_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1
    return written


def _left_padded(
    model: Any, prompts: Sequence[Sequence[int]], cache: DynamicCache, shared: int
) -> tuple[Tensor, Tensor]:
    """What of the prompts is still to be computed, and the mask of all of it, both int64; the cache holds the rest.

    Padding is id 0, which the mask hides.
    """
    if shared:
        prefix_1T = torch.tensor([prompts[0][:shared]], device=model.device)
        model(input_ids=prefix_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    rests = [list(prompt[shared:]) for prompt in prompts]
    width = max(map(len, rests))
    ids_BT = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=model.device)
    masks = [[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
    return ids_BT, torch.tensor(masks, device=model.device)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at least one left for each; 0 where sharing would not pay."""
    if len(prompts) == 1:
        return 0
    columns = zip(*prompts, strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(shared, min(map(len, prompts)) - 1)
    return shared if shared >= _MIN_SHARED_TOKENS else 0


def growing_cache(model: Any) -> DynamicCache:
    """A cache whose unbounded layers grow in place, where `DynamicCache` copies all of it for every token.

    Layers of other kinds, such as sliding windows, stay as they are.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as views of tensors with room for more tokens."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`; the rows may have changed in number since the last one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: list[Tensor] = []
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        fits = self._rooms and self._rooms[0].shape[0] == len(key_states) and end <= self._rooms[0].shape[-2]
        if not fits:
            self._rooms = []
            for old, new in ((self.keys, key_states), (self.values, value_states)):
                room = new.new_empty(*new.shape[:2], end + _SPARE_TOKENS, new.shape[-1])
                if old.numel():
                    room[:, :, :start] = old
                self._rooms.append(room)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values
