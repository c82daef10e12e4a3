"""Data sets as token ids: read, checked, templated, truncated with a count, ordered by a seed.

dataset = read_dataset(Path("train.jsonl"), tokenizer, template="chat", max_tokens=512)
first, held = dataset.split(held_out=16, seed=0)
order = Order(len(first.examples), seed=0)
batch = [first.examples[index] for index in order.take(drawn=0, count=8)]

`tutelage.trainer.data.mixture` draws from several of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.chat import OWN, Chat
from tutelage.data.conversations import Turns
from tutelage.data.dataset_files import TokenizedExample, stream_examples, truncate
from tutelage.data.prompts import Template
from tutelage.data.rows import WHOLE, Part
from tutelage.errors import DataError
from tutelage.trainer.data.seeding import numpy_generator


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set, in its order."""

    examples: tuple[TokenizedExample, ...]
    fingerprint: str
    """SHA-256, hex, of the token ids of all examples."""
    dropped_prompts: int
    """Rows left out because their prompt alone fills `max_tokens`."""
    truncated_completions: int
    """Rows whose completion lost its end."""
    tokens_cut: int
    """Completion tokens that truncation removed."""
    left_out: int = 0
    """Fields that the chat template leaves out by its design: reasoning of turns that are over."""

    def counts(self) -> dict[str, int]:
        """What of the data is learned from, and what its length cost; by name, for a file."""
        return {
            "rows": len(self.examples) + self.dropped_prompts,
            "dropped_prompts": self.dropped_prompts,
            "truncated_completions": self.truncated_completions,
            "tokens_cut": self.tokens_cut,
        }

    def cost_of_length(self, max_tokens: int) -> tuple[str, ...]:
        """What people must know of it, a line each: rows that were left out, completions that lost their end."""
        rows = len(self.examples) + self.dropped_prompts
        lines = {
            f"{self.dropped_prompts:,} of {rows:,} rows are left out: their prompt alone fills "
            f"{max_tokens:,} tokens (batch.max_tokens)": self.dropped_prompts,
            f"{self.truncated_completions:,} of {rows:,} completions lost their end, {self.tokens_cut:,} tokens "
            f"together: with their prompt they have more than {max_tokens:,} (batch.max_tokens)": self.tokens_cut,
        }
        return tuple(line for line, count in lines.items() if count)

    def split(self, *, held_out: int, seed: int) -> tuple[Dataset, tuple[TokenizedExample, ...]]:
        """The rows to train on, and `held_out` seeded rows that are not among them, however often they are there.

        Raises:
            DataError: no row would be left to train on.

        """
        if held_out >= len(self.examples):
            raise DataError(
                f"{held_out} held-out sequences of {len(self.examples)} rows leave none to train on; "
                "give more data or lower held_out.sequences"
            )
        order = numpy_generator(seed, "held-out").permutation(len(self.examples))
        held = {int(index) for index in order[:held_out]}
        same = {row_key(self.examples[index]) for index in held}
        rest = tuple(example for example in self.examples if row_key(example) not in same) if held else self.examples
        if not rest:
            raise DataError(
                f"all rows are the {held_out} held-out ones, some of them several times, which leaves none to train "
                "on; give more data or lower held_out.sequences"
            )
        return replace(self, examples=rest), tuple(self.examples[index] for index in sorted(held))


def row_key(example: TokenizedExample) -> bytes:
    """What makes two rows the same: prompt and completion."""
    return example.prompt_ids.tobytes() + b"/" + example.completion_ids.tobytes()


@dataclass(frozen=True)
class Order:
    """A seeded permutation per epoch, addressed by the number of examples drawn before."""

    size: int
    seed: int
    source: tuple[int, ...] = ()
    """Which of several data sets it is of: each has permutations of its own."""

    def take(self, drawn: int, count: int) -> list[int]:
        """Indices of the `count` examples that follow the first `drawn`."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(drawn + len(indices), self.size)
            permutation = _permutation(self.size, self.seed, self.source, epoch)
            indices += permutation[offset : offset + count - len(indices)].tolist()
        return indices


@lru_cache(maxsize=16)
def _permutation(size: int, seed: int, source: tuple[int, ...], epoch: int) -> npt.NDArray[np.int64]:
    return numpy_generator(seed, "order", *source, epoch).permutation(size)


def read_dataset(
    path: Path,
    tokenizer: Any,
    *,
    template: Template,
    max_tokens: int,
    chat: Chat = OWN,
    turns: Turns = "all",
    part: Part = WHOLE,
) -> Dataset:
    """Reads a data set whole.

    Args:
        path: of it.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: as `tutelage.data.dataset_files.stream_examples`, and so are `chat`, `turns` and `part`.
        max_tokens: as `tutelage.data.dataset_files.truncate`.
        chat: under the template `chat`, how conversations are rendered.
        turns: of messages, which answers are learned from.
        part: of a data set that has several.

    Raises:
        DataError: as `stream_examples` and `truncate`.

    """
    examples = stream_examples(path, tokenizer, template=template, chat=chat, turns=turns, part=part)
    kept = truncate(examples, max_tokens, path)
    return Dataset(
        kept.examples,
        fingerprint(kept.examples),
        kept.dropped_prompts,
        kept.truncated_completions,
        kept.tokens_cut,
        sum(len(example.left_out) for example in kept.examples),
    )


def fingerprint(examples: Iterable[TokenizedExample]) -> str:
    """SHA-256, hex, of all token ids, of what of them is learned from, and of who is asked about it."""
    total = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.completion_ids):
            # With its length before it, so that no other split of the same ids has the same fingerprint.
            total.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        if example.mask is not None:
            total.update(example.mask.tobytes())
        if example.teacher_prompt_ids is not None:
            total.update(example.teacher_prompt_ids.tobytes())
        if example.teacher is not None:
            total.update(example.teacher.encode())
    return total.hexdigest()
