"""What teacher and student know each other by: digests of weights, tokenizer and chat template; end tokens.

Two models can exchange token ids only if every field of their tokenizers that shapes ids is equal;
equal vocabulary sizes say nothing. Only added tokens of the teacher's may follow the student's: those ids no student
writes. All digests are SHA-256 in hex.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import DataError, IdentityMismatch

# What the ids of a text depend on; decoder and post-processor do not matter once ids are given.
_MODEL_FIELDS = ("vocab", "merges", "type", "byte_fallback", "unk_token", "ignore_merges")


_FIRST = "added_tokens.first_"
_MOST_ADDED = 64
"""Tokens that a teacher may have after the student's; each costs a digest in what it says of itself."""


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def tokenizer_digests(checkpoint: Path) -> dict[str, str]:
    """Digest by field of the `tokenizer.json` in a checkpoint directory.

    Fields: `vocabulary`, `merges`, `model` (type and switches), `added_tokens` (id and text), `normalizer`,
    `pre_tokenizer`; and `added_tokens.first_N` of the first N added tokens by id, for the last few N, by which a
    tokenizer that goes on after another one is known.

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
    added = [[token["id"], token["content"]] for token in tokenizer.get("added_tokens", [])]
    by_id = sorted(added)
    firsts = range(max(0, len(added) - _MOST_ADDED), len(added) + 1)
    return {
        "vocabulary": _digest(model.get("vocab")),
        "merges": _digest(merges),
        "model": _digest({key: model.get(key) for key in _MODEL_FIELDS[2:]}),
        "added_tokens": _digest(added),
        **{f"{_FIRST}{count}": _digest(by_id[:count]) for count in firsts},
        "normalizer": _digest(tokenizer.get("normalizer")),
        "pre_tokenizer": _digest(tokenizer.get("pre_tokenizer")),
    }


def chat_template_digest(checkpoint: Path) -> str:
    """Digest of the chat template in a checkpoint directory, or the empty string if it has none."""
    template_file = checkpoint / "chat_template.jinja"
    if template_file.exists():
        return _digest(template_file.read_bytes().decode().replace("\r\n", "\n"))
    config_file = checkpoint / "tokenizer_config.json"
    if not config_file.exists():
        return ""
    template = json.loads(config_file.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):  # Several by name: the default one is applied, and saved as chat_template.jinja.
        template = {each["name"]: each["template"] for each in template}.get("default")
    return _digest(template.replace("\r\n", "\n")) if template else ""


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
    """Refuses a pair in which an id of the student's does not mean the same to the teacher.

    Args:
        teacher: as `tokenizer_digests`; its added tokens may be the student's and, with higher ids, others.
        student: as `tokenizer_digests`.

    Raises:
        IdentityMismatch: names the fields that differ.

    """
    fields = {key for key in teacher.keys() | student.keys() if not key.startswith(_FIRST)}
    differing = sorted(key for key in fields if teacher.get(key) != student.get(key))
    if differing == ["added_tokens"]:
        counts = [int(key.removeprefix(_FIRST)) for key in student if key.startswith(_FIRST)]
        all_of_student = f"{_FIRST}{max(counts, default=0)}"
        if counts and teacher.get(all_of_student) == student[all_of_student]:
            return
    if differing:
        raise IdentityMismatch(
            f"the tokenizers of teacher and student differ in {', '.join(differing)}; token ids would not mean "
            "the same to both. Use a student with the teacher's tokenizer",
            "tokenizer",
        )


def end_token_ids(checkpoint: Path) -> list[int]:
    """The tokens that end a text for this model: the tokenizer's and those of `generation_config.json`, ascending."""
    ends: set[int] = set()
    generation_file = checkpoint / "generation_config.json"
    if generation_file.exists():
        configured = json.loads(generation_file.read_text(encoding="utf-8")).get("eos_token_id")
        ends.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    config_file = checkpoint / "tokenizer_config.json"
    token = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token") if config_file.exists() else None
    if token is not None:
        text = token["content"] if isinstance(token, dict) else token
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens", [])}
        found = added.get(text, tokenizer["model"]["vocab"].get(text))
        ends.update([] if found is None else [found])
    return sorted(ends)


def require_same_template(teacher: str, student: str) -> None:
    """Refuses a pair that writes chats in different ways; a side without a template (an empty digest) is no other way.

    Raises:
        IdentityMismatch: both have a chat template, and they differ.

    """
    if teacher and student and teacher != student:
        raise IdentityMismatch(
            f"the chat templates of teacher ({teacher[:12]}…) and student ({student[:12]}…) differ: the teacher would "
            "score prompts that it has never seen so written. Copy the teacher's chat_template.jinja into the "
            "student's folder, or say data.chat_template: student to use the student's with this teacher",
            "data.chat_template",
        )


# Where pipelines of tokenizers differ: spaces and their runs, digits, contractions, case, accents in both forms,
# scripts without spaces, emoji, code. None begins with a space, where Llama's older files and its class differ by one
# space without harm: the class does not add its own to a text that has one, the files do.
_PROBES = (
    "Ann has 3 apples and buys 24 more, so she has 1,234.50 in all.",
    "Two  spaces\tand\ta tab\n\nnew lines\r\n",
    "I'll say it's DON'T, won't we? (Yes!) [no] {maybe} <x>",
    "Zürich, naïve, cafe\u0301, ÇA, ﬁn, ½, ²",
    "東京は大きい。 Привет! مرحبا 👩\u200d🔬🙂",
    "def f(x):\n    return x ** 2 if x != 0 else None  # 100%",
)


def require_tokenizer_as_its_file(tokenizer: Any, checkpoint: Path) -> None:
    """Refuses a tokenizer that splits text otherwise than its `tokenizer.json`, which the digests are of, says.

    transformers builds some classes' pipelines anew (LlamaTokenizer, Qwen2Tokenizer and others) and takes only
    vocabulary and merges from the file.

    Args:
        tokenizer: what transformers made of the checkpoint.
        checkpoint: its directory.

    Raises:
        IdentityMismatch: names the class and the first text that they split differently.

    """
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    added = {each.content for each in file.get_added_tokens_decoder().values()}
    for text in (*_PROBES, *sorted(added | set(tokenizer.get_added_vocab()))):
        if tokenizer.encode(text, add_special_tokens=False) != file.encode(text, add_special_tokens=False).ids:
            raise IdentityMismatch(
                f"{checkpoint / 'tokenizer.json'} and the class that transformers reads it with, "
                f"{type(tokenizer).__name__}, split {text[:40]!r} into different tokens; token ids would not mean the "
                "same to others who read the file. Name the class that the file was made for (tokenizer_class in "
                "tokenizer_config.json; a model_type that has its own, as qwen2, takes that all the same), or, if the "
                "class reads it as you mean it, save the tokenizer anew with it",
                "tokenizer_class",
            )
