"""A data file as token ids: the same for the trainer that learns from it and the teacher that scores it ahead.

`read_examples(path, tokenizer, template="chat")` gives prompt and completion of each row, in the file's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.conversations import BadRow, Conversation, Message, conversation_of, format_of
from tutelage.data.prompts import Template, completion_end_id, prompt_ids, prompt_text
from tutelage.data.rows import read_rows
from tutelage.errors import DataError

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenizedExample:
    """One row as token ids."""

    prompt_ids: TokenIds
    """What a student continues when it writes."""
    completion_ids: TokenIds
    """Empty if the data has no completion; else ends with its template's end token unless truncated."""
    mask: Mask | None = None
    """bool [prompt + completion]: which tokens are learned from; None means the completion's."""
    teacher: str | None = None
    """Name of the teacher that is asked about it; None means the run's one."""
    teacher_prompt: str | None = None
    """What the teacher reads in place of the prompt, as the row says it; None means the prompt."""
    teacher_messages: tuple[Message, ...] | None = None
    """The same as messages."""


@dataclass(frozen=True)
class Truncation:
    """Examples of bounded length, and what that cost."""

    examples: tuple[TokenizedExample, ...]
    dropped_prompts: int
    """Rows left out because their prompt alone fills the length."""
    truncated_completions: int
    """Rows whose completion lost its end."""
    tokens_cut: int
    """Completion tokens that truncation removed."""


def read_examples(path: Path, tokenizer: Any, *, template: Template) -> list[TokenizedExample]:
    """Reads a `.jsonl`, `.json` (a list of rows) or `.parquet` file.

    Args:
        path: the file; or one on the hub, as `tutelage.data.hub.local_file`.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: as `tutelage.data.prompts` has them.

    Raises:
        DataError: the file is missing, empty or of another kind; or a row is not as it must be, or says what the
            template would lose; named by file, line (row, for Parquet and JSON lists) and field.

    """
    end_id = completion_end_id(template, tokenizer)
    encode_prompt = prompt_encoder(tokenizer, template)
    examples = []
    for _, conversation in read_conversations(path):
        completion_ids = np.zeros(0, np.int32)
        if conversation.completion is not None:
            # Prompt and completion are tokenized apart, as sampling sees them: it begins after whole tokens.
            ids = tokenizer(conversation.completion, add_special_tokens=False)["input_ids"]
            completion_ids = np.asarray(ids if ids[-1:] == [end_id] else [*ids, end_id], np.int32)
        examples.append(
            TokenizedExample(
                encode_prompt(conversation),
                completion_ids,
                teacher=conversation.teacher,
                teacher_prompt=conversation.teacher_prompt,
                teacher_messages=conversation.teacher_messages,
            )
        )
    return examples


def read_conversations(path: Path) -> list[tuple[dict[str, Any], Conversation]]:
    """Each row of a data file, as it stands there and as a conversation; all have the first one's format.

    Raises:
        DataError: as `read_examples`.

    """
    row_format = None
    conversations = []
    for row in read_rows(path):
        try:
            row_format = row_format or format_of(row.values)
            conversations.append((row.values, conversation_of(row.values, row_format, row.where)))
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{row.where}: {problem}", field) from error
    if not conversations:
        raise DataError(f"{path} holds no rows")
    return conversations


def truncate(examples: Sequence[TokenizedExample], max_tokens: int, path: Path) -> Truncation:
    """Examples whose prompt and completion have at most `max_tokens` together.

    Longer completions lose their end; rows whose prompt leaves no room for one token are dropped.

    Raises:
        DataError: that is every row.

    """
    kept, truncated, tokens_cut = [], 0, 0
    for example in examples:
        room = max_tokens - len(example.prompt_ids)
        if room < 1:
            continue
        over = max(0, len(example.completion_ids) - room)
        truncated, tokens_cut = truncated + (over > 0), tokens_cut + over
        length = len(example.prompt_ids) + min(room, len(example.completion_ids))
        mask = None if example.mask is None else example.mask[:length]
        kept.append(replace(example, completion_ids=example.completion_ids[:room], mask=mask))
    if not kept:
        raise DataError(f"every prompt of {path} fills {max_tokens} tokens; raise batch.max_tokens", "batch.max_tokens")
    return Truncation(tuple(kept), len(examples) - len(kept), truncated, tokens_cut)


def prompt_encoder(tokenizer: Any, template: Template) -> Callable[[Conversation], TokenIds]:
    """Turns the prompt of a conversation into token ids; what it raises is as `prompt_text`."""
    return lambda conversation: np.asarray(
        prompt_ids(template, prompt_text(template, conversation, tokenizer), tokenizer), np.int32
    )
