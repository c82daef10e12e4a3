"""A data file as token ids: the same for the trainer that learns from it and the teacher that scores it ahead.

`read_examples(path, tokenizer, template="chat")` gives prompt and completion of each row, in the file's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.conversations import BadRow, Conversation, conversation_of, format_of
from tutelage.data.hub import local_file
from tutelage.data.prompts import Template, prompt_ids, prompt_text
from tutelage.errors import DataError

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenizedExample:
    """One row as token ids."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    """Empty if the data has no completion; else ends with the end-of-sequence token unless truncated."""


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
        DataError: the file is missing, empty or of another kind; or a row is not as it must be, named
            by file, line (row, for Parquet and JSON lists) and field.

    """
    encode = _encoder(tokenizer, template)
    return [encode(conversation) for _, conversation in read_conversations(path)]


def read_conversations(path: Path) -> list[tuple[dict[str, Any], Conversation]]:
    """Each row of a data file, as it stands there and as a conversation; all have the first one's format.

    Raises:
        DataError: as `read_examples`.

    """
    row_format = None
    conversations = []
    for where, row in _rows(path):
        try:
            row_format = row_format or format_of(row)
            conversations.append((row, conversation_of(row, row_format)))
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{path}, {where}: {problem}", field) from error
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
        kept.append(TokenizedExample(example.prompt_ids, example.completion_ids[:room]))
    if not kept:
        raise DataError(f"every prompt of {path} fills {max_tokens} tokens; raise batch.max_tokens", "batch.max_tokens")
    return Truncation(tuple(kept), len(examples) - len(kept), truncated, tokens_cut)


def prompt_encoder(tokenizer: Any, template: Template) -> Callable[[Conversation], TokenIds]:
    """Turns the prompt of a conversation into token ids; what it raises is as `prompt_text`."""
    return lambda conversation: np.asarray(
        prompt_ids(template, prompt_text(template, conversation, tokenizer), tokenizer), np.int32
    )


def _encoder(tokenizer: Any, template: Template) -> Callable[[Conversation], TokenizedExample]:
    """Turns a conversation into token ids; prompt and completion are tokenized apart, as sampling sees them."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    encode_prompt = prompt_encoder(tokenizer, template)

    def encode(conversation: Conversation) -> TokenizedExample:
        completion = np.zeros(0, np.int32)
        if conversation.completion is not None:
            ids = tokenizer(conversation.completion, add_special_tokens=False)["input_ids"]
            completion = np.asarray([*ids, tokenizer.eos_token_id], np.int32)
        return TokenizedExample(encode_prompt(conversation), completion)

    return encode


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise DataError(f"{path} is none of {', '.join(readers)}; convert it to one of them")
    file = local_file(path)
    if not file.is_file():
        raise DataError(f"{path} is not a file; give the path of a data set")
    for where, row in readers[path.suffix](file):
        if not isinstance(row, dict):
            raise DataError(f"{path}, {where}: holds {type(row).__name__}, expected an object with named fields")
        yield where, row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, f"line {number}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(path.read_text(encoding="utf-8"), path, "the whole file")
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}, expected a list of rows")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}, {where}: is not JSON ({error})") from error
