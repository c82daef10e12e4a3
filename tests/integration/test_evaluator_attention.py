"""Log-likelihoods and greedy answers are those of plain forward passes, for every kind of attention.

One architecture or more of each kind, tiny and with random weights: full attention with rotary, learned and ALiBi
positions; sliding windows alone and beside full layers; chunks; windows that the attention itself applies; latent
attention; sinks; recurrent states alone and beside attention; mixtures of experts. The others of a kind are in the long
form.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.errors import ConfigurationError
from tutelage.evaluator.models.base import Sampling, ScoringGroup
from tutelage.evaluator.models.transformers_engine import TransformersEngine

WINDOW = 32
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**SIZES, "head_dim": 16}
SLIDING = {**WIDE, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SMALL = {"vocab_size": 512, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
ALTERNATING = ["linear_attention", "full_attention"] * 2

# Name, model type (if another), sizes; the first half shares contexts, the second cannot.
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", WIDE),
    "smollm3": ("smollm3", SIZES),
    "gemma": ("gemma", WIDE),
    "olmo2": ("olmo2", SIZES),
    "granite": ("granite", SIZES),
    "glm4": ("glm4", WIDE),
    "phi": ("phi", SIZES),
    "gpt_neox": ("gpt_neox", SIZES),
    "stablelm": ("stablelm", SIZES),
    "mistral without a window": ("mistral", {**WIDE, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **EXPERTS}),
    "deepseek_v3": ("deepseek_v3", {**SIZES, **ROUTED, **LATENT, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}),
}
NOT_SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", SLIDING),
    "mixtral": ("mixtral", {**SLIDING, "num_local_experts": 4}),
    "phi3": ("phi3", {**SIZES, "sliding_window": WINDOW}),
    "starcoder2": ("starcoder2", {**SIZES, "sliding_window": WINDOW}),
    "qwen2 with a window": (
        "qwen2",
        {**SIZES, "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "gemma2": ("gemma2", SLIDING),
    "gemma3": ("gemma3_text", SLIDING),
    "gemma3 inside a model that also sees": (
        "gemma3",
        {"text_config": SLIDING, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "cohere2": ("cohere2", {**SIZES, "sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {**SLIDING, "num_local_experts": 4}),
    "olmo3": ("olmo3", {**SIZES, "sliding_window": WINDOW}),
    "exaone4": ("exaone4", {**SIZES, "sliding_window": WINDOW}),
    "llama4": (
        "llama4_text",
        {**WIDE, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96, "num_local_experts": 2},
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            **SMALL,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
            "max_position_embeddings": 512,
        },
    ),
    "bloom": ("bloom", {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {**SMALL, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "falcon with alibi": (
        "falcon",
        {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "qwen3_next": ("qwen3_next", {**WIDE, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 32}),
    "lfm2": ("lfm2", {**SIZES, "full_attn_idxs": [1, 3]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **SIZES,
            **MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "bamba": ("bamba", {**SIZES, **MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**SIZES, **MAMBA, "mamba_d_ssm": 128}),
    "jamba": (
        "jamba",
        {
            **SIZES,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "minimax": ("minimax", {**WIDE, "num_local_experts": 2, "layer_types": ALTERNATING}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            **SIZES,
            "attention_window_size": WINDOW,
            "lru_width": 64,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "mamba": ("mamba", {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {
            **SMALL,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
}
KINDS = {**SHARING, **NOT_SHARING}
OF_EACH_KIND = (
    "llama", "gpt2", "bloom", "mistral", "gemma3", "llama4", "gpt_neo", "deepseek_v3", "gpt_oss", "mamba", "qwen3_next",
    "qwen3_moe",
)  # fmt: skip
CASES = [kind if kind in OF_EACH_KIND else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
NOT_DECODED = ("mamba", "mamba2", "minimax")
LENGTHS = (5, WINDOW - 1, WINDOW, WINDOW + 1, 65, 79, 200)


def write_model(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A checkpoint of that kind with the tiny model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def plain_model(folder: Path) -> Any:
    """The model as transformers loads it by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_logp(model: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), dim=-1)
    first = len(context) - 1
    return sum(float(logp[first + index, token]) for index, token in enumerate(continuation))


def plain_greedy(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    """Without a cache: everything is computed anew for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != end):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", CASES)
def test_log_likelihoods_are_those_of_plain_forward_passes(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_model(kind, tiny_model, tmp_path)
    engine, model = TransformersEngine(folder, dtype="float32", batch_size=8), plain_model(folder)
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 512, (count,), generator=generator).tolist())

    groups = [ScoringGroup(ids(length), (ids(1), ids(4), ids(12))) for length in LENGTHS]
    for group, scores in zip(groups, engine.loglikelihood(groups), strict=True):
        expected = [plain_logp(model, group.context, one) for one in group.continuations]
        assert scores == pytest.approx(expected, abs=1e-4)
    assert (engine._why_not == "") == (kind in SHARING)


@pytest.mark.parametrize("kind", CASES)
def test_greedy_answers_are_those_of_plain_forward_passes(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_model(kind, tiny_model, tmp_path)
    engine, model = TransformersEngine(folder, dtype="float32", batch_size=8), plain_model(folder)
    generator = torch.Generator().manual_seed(2)
    header = torch.randint(3, 512, (10,), generator=generator).tolist()
    prompts = [
        header + torch.randint(3, 512, (length,), generator=generator).tolist() for length in (3, WINDOW - 10, 41)
    ]
    sampling = Sampling(temperature=0, max_new_tokens=12)
    if kind in NOT_DECODED:
        with pytest.raises(ConfigurationError, match=r"a cache of transformers.*use the engine vllm"):
            engine.generate(prompts, [0] * 3, sampling)
        return
    answers = engine.generate(prompts, [0] * 3, sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = plain_greedy(model, prompt, 12, end=2)
        assert answer.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
