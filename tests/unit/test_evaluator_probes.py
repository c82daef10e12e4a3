"""What is told apart by decoding a few tokens: rounding of logits of any size, and another model's tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.errors import ConfigurationError
from tutelage.evaluator.models.probes import check_decoding


def model_of(largest_logit: float, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model whose likeliest token has about that logit, and the next one a few units in its last place less."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        hidden_D = model.model(torch.tensor([[3, 4]])).last_hidden_state[0, -1]
        model.lm_head.weight *= 0
        model.lm_head.weight[7] = hidden_D / hidden_D.float().norm() ** 2 * largest_logit
        model.lm_head.weight[8] = model.lm_head.weight[7] * (1 - 2 * torch.finfo(dtype).eps)
        model.model.layers[0].self_attn.o_proj.weight *= 0
        model.model.layers[0].mlp.down_proj.weight *= 0
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[4]  # the same state after each token
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest_logit", [8.0, 100.0, 1000.0])
@torch.inference_mode()
def test_a_token_that_rounding_may_prefer_is_no_fault_and_another_is(largest_logit: float, dtype: torch.dtype) -> None:
    model = model_of(largest_logit, dtype)
    top = model(torch.tensor([[3, 4, 5]])).logits[0, -1].float().topk(2)
    assert top.indices.tolist() == [7, 8]
    assert 0 < (top.values[0] - top.values[1]) / top.values[0] <= 4 * torch.finfo(dtype).eps
    check_decoding(model, lambda prompts: [[8, 7, 8] for _ in prompts])
    with pytest.raises(ConfigurationError, match="does not decode what its plain forward pass prefers"):
        check_decoding(model, lambda prompts: [[9, 7, 7] for _ in prompts])
