"""Makes a transformers model decode faster on a CPU, for a while, without changing what it computes.

    with fast_decoding(model):
        …one token for each of a few sequences at a time…

- A linear layer's weights are read once for a few rows: matrix · rowsᵀ takes them as they lie in memory, where
  rows · matrixᵀ packs them anew for every token. What bounds decoding is reading the weights.
- The query heads that share a key head are its queries, so that no key is repeated, and the fused kernel is used.

Shapes: B sequences, H query heads, G key heads, T positions, S head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

# On more rows the library's own kernels, which pack the weights, are the faster ones.
_FEW_ROWS = 32
_ATTENTION = "tutelage_trainer_grouped_sdpa"


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Speeds up the model's forward passes over few rows; without effect on a GPU."""
    if model.device.type != "cpu":
        yield
        return
    _register_attention()
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    attention = model.config._attn_implementation
    for layer in layers:
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
    if attention == "sdpa":
        model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear, input_D: Tensor) -> Tensor:
    """`layer` of any number of rows [..., D]."""
    rows_ND = input_D.reshape(-1, input_D.shape[-1])
    if len(rows_ND) > _FEW_ROWS:
        return linear(input_D, layer.weight, layer.bias)
    output_N = torch.mm(layer.weight, rows_ND.T).T
    if layer.bias is not None:
        output_N = output_N + layer.bias
    return output_N.reshape(*input_D.shape[:-1], -1)


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
