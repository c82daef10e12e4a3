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

from tutelage.data.hub import local_file
from tutelage.data.prompts import (
    BadRow,
    Exchange,
    Template,
    alpaca_prompt,
    chat_messages,
    exchange_of,
    form_of,
    plain_prompt,
)
from tutelage.errors import DataError

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    """Empty if the data has no completion; else ends with the end-of-sequence token unless truncated."""


@dataclass(frozen=True)
class Cut:
    """Examples of bounded length, and what that cost."""

    examples: tuple[Example, ...]
    dropped_prompts: int
    """Rows left out because their prompt alone fills the length."""
    truncated_completions: int
    """Rows whose completion lost its end."""
    tokens_cut: int
    """Completion tokens that truncation removed."""


def read_examples(path: Path, tokenizer: Any, *, template: Template) -> list[Example]:
    """Reads a `.jsonl`, `.json` (a list of rows) or `.parquet` file.

    Args:
        path: the file; or one on the hub, as `tutelage.data.hub.local_file`.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: `chat` applies the tokenizer's chat template, `alpaca` the prompt of LLM-Adapters,
            `plain` takes the last message as it is.

    Raises:
        DataError: the file is missing, empty or of another kind; or a row is not as it must be, named
            by file, line (row, for Parquet and JSON lists) and field.

    """
    encode = _encoder(tokenizer, template)
    return [encode(exchange) for _, exchange in read_exchanges(path)]


def read_exchanges(path: Path) -> list[tuple[dict[str, Any], Exchange]]:
    """Each row of a data file, as it stands there and as an exchange; all have the first one's form.

    Raises:
        DataError: as `read_examples`.

    """
    form = None
    exchanges = []
    for where, row in _rows(path):
        try:
            form = form or form_of(row)
            exchanges.append((row, exchange_of(row, form)))
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{path}, {where}: {problem}", field) from error
    if not exchanges:
        raise DataError(f"{path} holds no rows")
    return exchanges


def cut(examples: Sequence[Example], max_tokens: int, path: Path) -> Cut:
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
        kept.append(Example(example.prompt_ids, example.completion_ids[:room]))
    if not kept:
        raise DataError(f"every prompt of {path} fills {max_tokens} tokens; raise batch.max_tokens", "batch.max_tokens")
    return Cut(tuple(kept), len(examples) - len(kept), truncated, tokens_cut)


def prompt_encoder(tokenizer: Any, template: Template) -> Callable[[Exchange], TokenIds]:
    """Turns the prompt of an exchange into token ids.

    Raises:
        DataError: the template is `chat` and the tokenizer has none.

    """
    if template == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; choose template: alpaca or plain", "data.template")

    def text(exchange: Exchange) -> str:
        if template == "chat":
            messages = chat_messages(exchange)
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return alpaca_prompt(exchange) if template == "alpaca" else plain_prompt(exchange)

    # A chat template writes its own special tokens.
    return lambda exchange: _ids(tokenizer, text(exchange), special=template != "chat")


def _encoder(tokenizer: Any, template: Template) -> Callable[[Exchange], Example]:
    """Turns an exchange into token ids; prompt and completion are tokenized apart, as sampling sees them."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    encode_prompt = prompt_encoder(tokenizer, template)

    def encode(exchange: Exchange) -> Example:
        completion = np.zeros(0, np.int32)
        if exchange.completion is not None:
            ids = _ids(tokenizer, exchange.completion, special=False)
            completion = np.append(ids, np.int32(tokenizer.eos_token_id))
        return Example(encode_prompt(exchange), completion)

    return encode


def _ids(tokenizer: Any, text: str, *, special: bool) -> TokenIds:
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)


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
