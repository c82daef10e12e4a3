"""Which architectures does a teacher serve, and how exactly? Each made tiny with random weights, and served by vLLM.

    python benchmarks/teacher_architectures.py [NAME …] [--out FILE.json]

For each: `tutelage teacher serve` is started with a random model of two to four layers, and asked for the whole
distribution (`topk` with k = the vocabulary) of 256 random tokens and of a text. Beside the KL of that to the same
weights in transformers in float32 stands the KL of transformers itself in bfloat16: what rounding costs. Both are means
over positions, nats. The same sequences are asked for in parts too, each as it has grown, so that the later ones read
what the engine has cached of the former; how many tokens that were stands beside. A model that is not served says why,
in the words of whoever refused it. Exits with 1 if what is served, whole or in parts, is over three times as far as
transformers' own bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from packaged_models import tiny_folder  # noqa: E402

from teacher_process import running  # noqa: E402
from tutelage.identity import tokenizer_digests  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2 as pb  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc  # noqa: E402
from tutelage.teacher_server.model.self_check import TEXT  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.teacher.base import SignalSpec  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

VOCABULARY = 512
CUTS = (100, 170)
# Heads of 64, because vLLM's attention on a CPU takes no smaller ones of every kind. Where the code of one side knows
# no `head_dim`, there are two, so that both agree.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
WINDOWED = SIZES | {"sliding_window": 64}
LATENT = {
    "topk_method": "noaux_tc",  # as published; transformers knows no other, and vLLM has no default
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 512,  # the one for which there are kernels
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 64}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512} | ENDS
GPT2 |= {"initializer_range": 0.15}
FULL = ["full_attention"] * 2

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", WINDOWED),
    "qwen2": ("Qwen2Config", SIZES | {"num_attention_heads": 2}),
    "qwen3": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "mixtral": ("MixtralConfig", MOE),
    "gemma2, softcap": ("Gemma2Config", WINDOWED | {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64}),
    "gemma3, text": ("Gemma3TextConfig", WINDOWED),
    "phi3": ("Phi3Config", SIZES),
    "granite, scale": ("GraniteConfig", SIZES | {"logits_scaling": 8.0, "attention_multiplier": 0.125}),
    "granitemoe, scale": (
        "GraniteMoeConfig",
        MOE | {"num_attention_heads": 2, "logits_scaling": 8.0, "attention_multiplier": 0.125},
    ),
    "cohere2, scale": ("Cohere2Config", WINDOWED | {"logit_scale": 0.25, "layer_types": FULL}),
    "olmo2": ("Olmo2Config", SIZES),
    "glm4": ("Glm4Config", SIZES | {"partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3Config", SIZES),
    "gpt2, n_embd": ("GPT2Config", GPT2),
    "gpt_neox, embed_out": ("GPTNeoXConfig", SIZES | {"num_attention_heads": 2}),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 256, "word_embed_proj_dim": 128, "num_attention_heads": 2}),
    "phi, a bias": ("PhiConfig", SIZES | {"num_attention_heads": 2}),
    "nemotron": ("NemotronConfig", SIZES),
    "deepseek_v3, MLA": ("DeepseekV3Config", SIZES | LATENT),
    "gpt_oss": ("GptOssConfig", MOE | {"sliding_window": 64}),
    "lfm2, a hybrid": ("Lfm2Config", SIZES | {"num_attention_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MOE
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 128, "num_attention_heads": 2},
    ),
    "gemma3, multimodal": (
        "Gemma3Config",
        {"text_config": WINDOWED, "vision_config": VISION, "mm_tokens_per_image": 4} | ENDS,
    ),
}


def write(folder: Path, name: str) -> None:
    """A random model in bfloat16, with the tokenizer of the tiny model; no bias is zero, as all are when made."""
    import transformers

    config_class, settings = ARCHITECTURES[name]
    folder.mkdir()
    for path in tiny_folder().glob("*token*"):
        shutil.copy(path, folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 and not parameter.any():
                parameter.normal_(0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def sequences(folder: Path) -> list[np.ndarray]:
    """A text and random ids, of 256 tokens."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids[:256]
    random = np.random.default_rng(0).integers(3, VOCABULARY, 256)
    return [np.array(ids, np.int32) for ids in (text, random)]


@torch.inference_mode()
def own_logp(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """float64 [N, V], of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits = [
        model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0] for ids in sequences(folder)
    ]
    return torch.cat(logits)[:, :VOCABULARY].double().log_softmax(1)


def served_logp(folder: Path, client: TeacherClient, cuts: tuple[int, ...]) -> torch.Tensor:
    """float64 [N, V], of the teacher, asked for each sequence up to one cut after the other, from the one before on."""
    parts = []
    for ids in sequences(folder):
        for start, end in itertools.pairwise((0, *cuts, len(ids))):
            sequence = TokenSequence(ids[:end], start, end)
            parts += client.score([sequence], SignalSpec("topk", k=VOCABULARY, temperatures=(1.0,)))
    logp = torch.full((sum(map(len, sequences(folder))), VOCABULARY), -torch.inf, dtype=torch.float64)
    ids, logits, total = (
        torch.from_numpy(np.concatenate([part[name] for part in parts]))
        for name in ("ids_RK", "logits_RK", "logsumexp_RM")
    )
    return logp.scatter(1, ids.long(), logits.double() - total.double())


def ask(folder: Path, address: str, exact: torch.Tensor) -> dict[str, Any]:
    """What a served model's signals are worth, in parts and whole; in parts first, as long as nothing is cached."""
    values = {"student_id": "table", "wait_seconds": 60, "tokenizer_digests": tokenizer_digests(folder)}
    with TeacherClient(address, **values) as client, grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TeacherServiceStub(channel)
        before = stub.GetTeacherInfo(pb.GetTeacherInfoRequest()).prefix_cache
        parts = kl(exact, served_logp(folder, client, CUTS))
        cache = stub.GetTeacherInfo(pb.GetTeacherInfoRequest()).prefix_cache
        whole = kl(exact, served_logp(folder, client, ()))
    return {
        "parts": parts,
        "served": whole,
        "block": cache.block_tokens,
        "reused": cache.saved_tokens - before.saved_tokens,
    }


def kl(p_logp: torch.Tensor, q_logp: torch.Tensor) -> float:
    """Mean KL(p ‖ q), nats a position."""
    return float((p_logp.exp() * (p_logp - q_logp)).sum(1).mean())


def reason(error: Exception) -> str:
    """Why a model is not served, in one line: what vLLM's engine died of, or what the teacher says."""
    text = str(error)
    root = re.findall(r"EngineCore.*?\] (\w+(?:Error|Exception): .*)", text)
    _, name, said = text.partition("tutelage teacher: ")
    said = said if name else repr(error)
    return re.sub(r"\s+", " ", root[0] if root else said)[:400]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    started = time.monotonic()
    row: dict[str, Any] = {"name": name}
    try:
        write(folder, name)
        exact = own_logp(folder, torch.float32)
        row["bfloat16"] = kl(exact, own_logp(folder, torch.bfloat16))
        with running(folder / "server", folder, "--max-model-len", "512") as server:
            row |= ask(folder, server.address, exact)
    except Exception as error:  # whatever a model's code, vLLM or the teacher says belongs into the table
        row["refused"] = reason(error)
    return row | {"seconds": round(time.monotonic() - started)}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES], help="of architectures; all")
    parser.add_argument("--out", type=Path, help="file of the rows, JSON")
    options = parser.parse_args()
    rows = []
    print(f"{'architecture':<24}{'served':>10}{'in parts':>10}{'bfloat16':>10}{'ratio':>7}{'reused':>8}{'block':>7}")
    for name in options.names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder) / "model")
        rows.append(row)
        if "served" in row:
            ratio = row["served"] / row["bfloat16"]
            figures = "".join(f"{row[column]:>10.2g}" for column in ("served", "parts", "bfloat16"))
            print(f"{name:<24}{figures}{ratio:>7.2f}{row['reused']:>8}{row['block']:>7}", flush=True)
        else:
            print(f"{name:<24}{row['refused']}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    served = [row for row in rows if "served" in row]
    print(f"{len(served)} of {len(rows)} architectures are served")
    return int(any(max(row["served"], row["parts"]) > 3 * row["bfloat16"] for row in served))


if __name__ == "__main__":
    sys.exit(main())
