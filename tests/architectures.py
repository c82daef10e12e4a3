"""Tiny random models of many architectures, each with the tokenizer of the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

WINDOW = 8
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWED = SIZES | {"sliding_window": WINDOW}
MOE = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
STATES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", WINDOWED),
    "qwen2": ("Qwen2Config", WINDOWED | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}),
    "phi, a bias": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", WINDOWED),
    "gpt2": ("GPT2Config", GPT | ENDS),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gemma": ("GemmaConfig", SIZES),
    "gemma2, softcap": ("Gemma2Config", WINDOWED | {"final_logit_softcapping": 5.0}),
    "gemma3_text, softcap": ("Gemma3TextConfig", WINDOWED | {"final_logit_softcapping": 5.0}),
    "gemma4_text, softcap": ("Gemma4TextConfig", WINDOWED | PER_LAYER | {"final_logit_softcapping": 5.0}),
    "gemma4, nested": ("Gemma4Config", {"text_config": WINDOWED | PER_LAYER | {"final_logit_softcapping": 5.0}}),
    "cohere, scale": ("CohereConfig", SIZES | {"logit_scale": 0.0625}),
    "cohere2, scale": ("Cohere2Config", WINDOWED | {"logit_scale": 0.25}),
    "granite, scale": ("GraniteConfig", SIZES | {"logits_scaling": 8.0}),
    "granitemoe": ("GraniteMoeConfig", MOE | {"logits_scaling": 8.0}),
    "olmo2": ("Olmo2Config", SIZES),
    "olmoe": ("OlmoeConfig", MOE),
    "mixtral": ("MixtralConfig", MOE | {"sliding_window": WINDOW}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "gpt_oss": ("GptOssConfig", MOE | {"sliding_window": WINDOW}),
    "deepseek_v3": ("DeepseekV3Config", SIZES | LATENT),
    "smollm3": ("SmolLM3Config", SIZES),
    "starcoder2": ("Starcoder2Config", WINDOWED),
    "stablelm": ("StableLmConfig", SIZES),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"vocab_size": 512, "hidden_size": 32, "n_layer": 2, "n_head": 4} | ENDS),
    "nemotron": ("NemotronConfig", SIZES),
    "qwen3_next": ("Qwen3NextConfig", MOE | LINEAR | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 4}),
    "lfm2": ("Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("MambaConfig", STATES | ENDS),
    "mamba2": ("Mamba2Config", STATES | ENDS | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MOE | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "bamba": ("BambaConfig", SIZES | MAMBA | {"attn_layer_indices": [1]}),
    "llama4_text": (
        "Llama4TextConfig",
        MOE | {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a router's loss": (
        "Qwen3MoeConfig",
        MOE | {"output_router_logits": True, "router_aux_loss_coef": 0.01},
        r"adds \+0\.0\d+ to the loss .* \(router_aux_loss_coef 0\.01\)",
    ),
    "a cap by another name": ("RecurrentGemmaConfig", SIZES | {"num_hidden_layers": 3}, r"large states \(a softcap\)"),
    "a tower for images": (
        "Gemma3Config",
        {
            "text_config": WINDOWED,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
        },
        r"no gradient of the loss reaches model\.vision_tower.* more",
    ),
}


def write_architecture(folder: Path, tiny_model: Path, config_class: str, settings: dict[str, Any]) -> Path:
    """A checkpoint in float32; no bias is zero, as all are when a model is made."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 and not parameter.any():
                parameter.normal_(0.0, 0.1)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    # Some model types have a tokenizer class of their own, which reads no other pipeline than it writes.
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder
