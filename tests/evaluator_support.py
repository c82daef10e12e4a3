"""A checkpoint that exists and an engine that answers without a model, for tests of what is around the engine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from tutelage.evaluator.models.base import Generation, Sampling, ScoringGroup


class WordTokenizer:
    """A word is a token; ids are positions in a growing vocabulary."""

    chat_template = "<user> {content} <assistant>"

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def get_chat_template(self, *_: object) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return f"<user> {messages[0]['content']} <assistant>"


class EchoEngine:
    """Generates "The answer is <number of prompt tokens>."; prefers the first choice; notes what it was asked.

    `fails_on` makes it raise whenever a prompt of that many tokens is in the batch.
    """

    name, dtype = "echo", "none"

    def __init__(self, *, batch_size: int = 4, max_tokens: int = 4096, delay: float = 0.0, fails_on: int = -1) -> None:
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.tokenizer = WordTokenizer()
        self.delay, self.fails_on = delay, fails_on
        self.batches: list[int] = []

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Generation]:
        time.sleep(self.delay)
        self.batches.append(len(prompts))
        if any(len(prompt) == self.fails_on for prompt in prompts):
            raise RuntimeError("out of memory, say")
        return [Generation(f"The answer is {len(prompt)}.", 5, "stop") for prompt in prompts]

    def loglikelihood(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        time.sleep(self.delay)
        self.batches.append(len(groups))
        return [[-float(rank + 1) for rank in range(len(group.continuations))] for group in groups]

    def close(self) -> None:
        self.closed = True


def write_checkpoint(folder: Path, *, manifest: bool = False) -> Path:
    """Files that look like a checkpoint to everything but a model."""
    import hashlib

    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"not really"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if manifest:
        entries = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()}
        (folder / "MANIFEST.json").write_text(json.dumps({"files": entries}))
    return folder
