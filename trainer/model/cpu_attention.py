"""A student's attention on a CPU: the same as transformers' `sdpa`, faster where a student spends its time.

- Writing, one position a sequence: the query heads that share a key head become its queries, so that no key is
  repeated, and the fused kernel is used.
- Training on short sequences: in float32, in which the fused kernel's backward pass takes half as long as in bfloat16.

Shapes: the legend in docs/architecture.md; besides, H query heads in G groups that share a key head, E width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_NAME = "tutelage_student_sdpa"
# Forward and backward in float32 took 15 instead of 33 ms a layer with 126 positions, and 1.8 times as long as in
# bfloat16 with 512 (docs/training.md, two cores with AMX).
_SHORT_POSITIONS = 256


def use_fast_attention(model: Any) -> None:
    """Changes how a transformers model on a CPU attends, if it does so with `sdpa`."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # transformers looks both up by name: how to attend, and which kind of mask that takes.
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGTE: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, [B, T, H, E]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, H, T, E = query_BHTE.shape
    # transformers' own would repeat the keys H / G times before each of a sampled token's kernels.
    if T == 1 and key_BGTE.shape[1] < H:
        grouped_BGQE = query_BHTE.reshape(B, key_BGTE.shape[1], -1, E)
        mixed_BGQE = scaled_dot_product_attention(
            grouped_BGQE, key_BGTE, value_BGTE, attn_mask=attention_mask, scale=options["scaling"]
        )
        return mixed_BGQE.reshape(B, 1, H, E), None
    dtype = query_BHTE.dtype
    if T <= _SHORT_POSITIONS and query_BHTE.requires_grad:
        query_BHTE, key_BGTE, value_BGTE = query_BHTE.float(), key_BGTE.float(), value_BGTE.float()
    mixed_BTHE, _ = sdpa_attention_forward(module, query_BHTE, key_BGTE, value_BGTE, attention_mask, **options)
    return mixed_BTHE.to(dtype), None
