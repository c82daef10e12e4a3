"""Digests by which teacher and student know each other: weights, tokenizer, chat template.

Two models can exchange token ids only if every field of their tokenizers that shapes ids is equal;
equal vocabulary sizes say nothing. All digests are SHA-256 in hex.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tutelage.errors import DataError, IdentityMismatch

# What the ids of a text depend on; decoder and post-processor do not matter once ids are given.
_MODEL_FIELDS = ("vocab", "merges", "type", "byte_fallback", "unk_token", "ignore_merges")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def tokenizer_digests(checkpoint: Path) -> dict[str, str]:
    """Digest by field of the `tokenizer.json` in a checkpoint directory.

    Fields: `vocabulary`, `merges`, `model` (type and switches), `added_tokens` (id and text),
    `normalizer`, `pre_tokenizer`.

    Raises:
        DataError: there is no readable `tokenizer.json`.

    """
    path = checkpoint / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        model = tokenizer["model"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable fast tokenizer ({error}); save the model with one") from error
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return {
        "vocabulary": _digest(model.get("vocab")),
        "merges": _digest(merges),
        "model": _digest({key: model.get(key) for key in _MODEL_FIELDS[2:]}),
        "added_tokens": _digest([[token["id"], token["content"]] for token in tokenizer.get("added_tokens", [])]),
        "normalizer": _digest(tokenizer.get("normalizer")),
        "pre_tokenizer": _digest(tokenizer.get("pre_tokenizer")),
    }


def chat_template_digest(checkpoint: Path) -> str:
    """Digest of the chat template in a checkpoint directory, or the empty string if it has none."""
    template_file = checkpoint / "chat_template.jinja"
    if template_file.exists():
        return _digest(template_file.read_text(encoding="utf-8"))
    config_file = checkpoint / "tokenizer_config.json"
    if not config_file.exists():
        return ""
    template = json.loads(config_file.read_text(encoding="utf-8")).get("chat_template")
    return _digest(template) if template else ""


def vocabulary_size(checkpoint: Path) -> int:
    """One more than the largest id that the tokenizer can produce."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", []))]
    return int(max(ids)) + 1


def weights_digest(checkpoint: Path) -> str:
    """SHA-256 over the names and contents of `config.json` (an adapter's own) and every `*.safetensors`, by name.

    Raises:
        DataError: there is no safetensors file.

    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise DataError(f"{checkpoint} holds no *.safetensors; only safetensors weights are loaded")
    config = checkpoint / "config.json"
    if not config.exists():  # An adapter; its configuration names the model that it belongs to.
        config = checkpoint / "adapter_config.json"
    total = hashlib.sha256()
    for path in [config, *files]:
        with path.open("rb") as stream:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def require_same_tokenizer(teacher: Mapping[str, str], student: Mapping[str, str]) -> None:
    """Refuses a pair whose token ids do not mean the same.

    Raises:
        IdentityMismatch: names the fields that differ.

    """
    differing = sorted(key for key in teacher.keys() | student.keys() if teacher.get(key) != student.get(key))
    if differing:
        raise IdentityMismatch(
            f"the tokenizers of teacher and student differ in {', '.join(differing)}; token ids would not mean "
            "the same to both. Use a student with the teacher's tokenizer",
            "tokenizer",
        )
