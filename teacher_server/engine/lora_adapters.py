"""LoRA adapters beside a base model: one engine serves several teachers, `base` and `base@adapter`.

An adapter changes the layers and never the unembedding, so all of them share the base's signal head; what differs is
the engine's states, the weights digest and the store's folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import ConfigurationError, DataError, NotServed
from tutelage.names import check_name
from tutelage.teacher_server.config import TeacherConfig

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_HEAD_MODULES = {"lm_head", "embed_tokens", "embed_out", "wte", "embed_in"}


@dataclass(frozen=True)
class Adapter:
    """One adapter's files, and what was read from them."""

    name: str
    number: int
    """1, 2, …: vLLM's `lora_int_id`, by which it keeps adapters apart; it must be above 0."""
    folder: Path
    rank: int
    digest: str
    """SHA-256, hex, of its files."""

    def weights_digest(self, base: str) -> str:
        """Who the teacher is that has these weights over those of `base`."""
        return hashlib.sha256(f"{base} {self.digest}".encode()).hexdigest()


def read_adapters(config: TeacherConfig) -> list[Adapter]:
    """The adapters that a configuration names.

    Raises:
        ConfigurationError: a name is not allowed.
        DataError: a folder is no PEFT adapter with safetensors weights.
        NotServed: an adapter changes the head or the embeddings.

    """
    adapters = []
    for number, (given, folder) in enumerate(sorted(config.lora_modules.items()), 1):
        name, field, total = check_name(given, "lora_modules"), f"lora_modules.{given}", hashlib.sha256()
        try:
            for file in _FILES:
                total.update(file.encode() + b"\0" + hashlib.sha256((folder / file).read_bytes()).digest())
            settings = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
            rank = int(settings["r"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{folder} is no LoRA adapter ({error}); it needs {' and '.join(_FILES)}, as PEFT saves them"
            raise DataError(message, field) from error
        # PEFT saves a list of names, or a regular expression as one string.
        targets = settings.get("target_modules") or []
        changed = {*(targets if isinstance(targets, list) else [targets]), *(settings.get("modules_to_save") or [])}
        if _HEAD_MODULES & changed:
            raise NotServed(
                f"the adapter changes {', '.join(sorted(_HEAD_MODULES & changed))}, and the head is the base model's "
                "for all; merge it into the model and serve that",
                field,
            )
        adapters.append(Adapter(name, number, folder, rank, total.hexdigest()))
    return adapters


def lora_rank(adapters: list[Adapter], allowed: tuple[int, ...]) -> int:
    """The smallest rank that vLLM allows and that all adapters fit in.

    Raises:
        ConfigurationError: there is none.

    """
    largest = max(adapter.rank for adapter in adapters)
    fitting = [rank for rank in allowed if rank >= largest]
    if not fitting:
        raise ConfigurationError(f"an adapter has rank {largest}, at most {max(allowed)} is served", "lora_modules")
    return min(fitting)
