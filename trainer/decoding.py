"""Makes a transformers model decode faster on a CPU, for a while, without changing what it computes.

    with fast_decoding(model):
        …one token for each of a few sequences at a time…

The query heads that share a key head become its queries, so that no key is repeated, and the fused kernel is used.

Shapes: B sequences, H query heads, G key heads, T positions, S head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_ATTENTION = "tutelage_trainer_grouped_sdpa"


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Speeds up the model's forward passes over one position; without effect on a GPU, or on other attention."""
    attention = model.config._attn_implementation
    if model.device.type != "cpu" or attention != "sdpa":
        yield
        return
    _register_attention()
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _grouped_attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _grouped_attention(
    module: nn.Module,
    query_BHTS: Tensor,
    key_BGTS: Tensor,
    value_BGTS: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`; grouped where there is one position a sequence."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, H, T, S = query_BHTS.shape
    if T > 1 or key_BGTS.shape[1] == H:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHTS, key_BGTS, value_BGTS, attention_mask, **options
        )
        return plain
    grouped_BGQS = query_BHTS.view(B, key_BGTS.shape[1], -1, S)
    mixed_BGQS = scaled_dot_product_attention(
        grouped_BGQS, key_BGTS, value_BGTS, attn_mask=attention_mask, scale=options["scaling"]
    )
    return mixed_BGQS.reshape(B, 1, H, S), None
