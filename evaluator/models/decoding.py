"""How the evaluator decodes: the shared loop with a cache that grows in place, shared beginnings, grouped heads.

What makes it faster than a plain `generate` on the same batch:
- the tokens that all prompts begin with (a template's header) are computed once;
- a row that has ended leaves the batch and its cache;
- the cache grows in place in steps of many tokens, where `DynamicCache` copies all of it for every token;
- while decoding, the query heads that share a key head are its queries, so that no key is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tutelage import decoding

ATTENTION = "tutelage_grouped_sdpa"


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`sdpa`; for one position a row, the heads of a group are the queries of their one key head."""
    rows, heads, positions, size = query.shape
    if positions > 1 or heads == key.shape[1]:
        answer: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return answer
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.view(rows, key.shape[1], -1, size), key, value, attn_mask=attention_mask, scale=options["scaling"]
    )
    return mixed.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def decode(
    model: Any,
    prompts: Sequence[list[int]],
    generators: Sequence[torch.Generator],
    *,
    temperature: float,
    max_new_tokens: int,
    end_ids: frozenset[int],
    share_prefix: bool = True,
) -> list[list[int]]:
    """Token ids after each prompt, the end token included.

    Args:
        model: causal language model, with the attention `ATTENTION` for the speed that is said above.
        prompts: token ids, none empty.
        generators: one a prompt, on the model's device; each decides its prompt's samples.
        temperature: 0 takes the likeliest token.
        max_new_tokens: at most so many.
        end_ids: tokens that end an answer.
        share_prefix: computes what all prompts begin with once; only for models that `probes` allows it for.

    """

    def next_ids(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        return choose(logits_BV.float(), temperature, [generators[row] for row in rows])

    return decoding.decode(
        model,
        prompts,
        next_ids=next_ids,
        room=[max_new_tokens] * len(prompts),
        end_ids=end_ids,
        share_prefix=share_prefix,
    )


def choose(logits_BV: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, sampled from the row's own generator (Gumbel-max) unless greedy."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    uniform_BV = torch.stack(
        [torch.rand(logits_BV.shape[1], generator=generator, device=logits_BV.device) for generator in generators]
    )
    # Bounds away from 0 and 1, where a logarithm would be infinite and one token would win whatever its logit.
    gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
    return (logits_BV / temperature + gumbel_BV).argmax(dim=-1)
