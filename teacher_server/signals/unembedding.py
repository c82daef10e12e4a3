"""The matrix that turns hidden states into logits, read from a checkpoint, with what the model does after it.

Models differ in what follows the matrix: Cohere multiplies the logits, Granite divides them, Gemma caps
them softly. Only model types whose head is known here are served; a wrong head would teach wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import DataError, NotServed

if TYPE_CHECKING:
    import torch

# Heads that are a plain matrix, but for the bias, the scale and the softcap that `load` reads.
KNOWN_MODEL_TYPES = frozenset(
    {
        "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
        "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    }
)  # fmt: skip
_HEAD_NAMES = ("lm_head", "embed_out")  # embed_out: GPT-NeoX
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True)
class Unembedding:
    """logits = scale · (hidden · weightᵀ + bias), then softcap · tanh(logits / softcap) if softcap > 0."""

    weight_VD: torch.Tensor
    """[vocabulary_size, hidden_size], bfloat16 or float32; padded rows are cut off."""

    bias_V: torch.Tensor | None
    """float32 [vocabulary_size], if the head has one."""

    scale: float
    """What logits are multiplied with."""

    softcap: float
    """0 if there is none."""

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the rows' bytes in order, followed by the bias' bytes if there is one."""
        total = hashlib.sha256(rows_bytes(self.weight_VD))
        if self.bias_V is not None:
            total.update(rows_bytes(self.bias_V))
        return total.hexdigest()


def rows_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def load(checkpoint: Path, vocabulary_size: int) -> Unembedding:
    """Reads the head of a checkpoint directory.

    Args:
        checkpoint: Hugging Face directory with `config.json` and `*.safetensors`.
        vocabulary_size: ids the tokenizer can produce; further rows of the matrix are padding.

    Raises:
        NotServed: a model type whose head is not known, or a head that is quantized.
        DataError: the head is not in the files, or has fewer rows than the vocabulary.

    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        raise NotServed(
            f"the head of model type {model_type!r} is not known; served are {', '.join(sorted(KNOWN_MODEL_TYPES))}. "
            "Add it to teacher_server/signals/unembedding.py once its logits are checked",
            "model",
        )
    scale = 1.0
    if model_type in ("cohere", "cohere2"):
        scale = float(config.get("logit_scale", 0.0625))  # the default of both in transformers
    elif model_type == "granite":
        scale = 1.0 / float(config.get("logits_scaling", 1.0))
    weight, bias = _read_head(checkpoint, tied=config.get("tie_word_embeddings"))
    if weight.shape[0] < vocabulary_size:
        raise DataError(f"the head has {weight.shape[0]} rows for {vocabulary_size} token ids", "model")
    return Unembedding(
        weight_VD=weight[:vocabulary_size].contiguous(),
        bias_V=None if bias is None else bias[:vocabulary_size].float().contiguous(),
        scale=scale,
        softcap=float(config.get("final_logit_softcapping") or 0.0),
    )


def _read_head(checkpoint: Path, *, tied: bool | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias. A file may leave out `tie_word_embeddings`; a stored head then decides."""
    from safetensors import safe_open

    files = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), path))
    head = next((name for name in _HEAD_NAMES if f"{name}.weight" in files), None)
    if head is not None and not tied:
        bias = _read(files, f"{head}.bias") if f"{head}.bias" in files else None
        return _as_served(_read(files, f"{head}.weight")), bias
    embeddings = [name for name in files if name.endswith(_EMBEDDING_NAMES)]
    if len(embeddings) != 1:
        raise DataError(f"{checkpoint} holds neither a head nor one token embedding (found {embeddings})", "model")
    return _as_served(_read(files, embeddings[0])), None


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(files[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _as_served(weight: torch.Tensor) -> torch.Tensor:
    import torch

    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise NotServed(f"the head is stored as {weight.dtype}; only unquantized heads are served", "model")
    # float32 holds every float16 number; bfloat16, which the contract has besides, does not.
    return weight.float() if weight.dtype == torch.float16 else weight
