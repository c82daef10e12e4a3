"""Data sets as token ids: read, checked, templated, truncated with a count, ordered by a seed.

dataset = read_dataset(Path("train.jsonl"), tokenizer, template="chat", max_tokens=512)
first, held = dataset.split(held_out=16, seed=0)
order = Order(len(first.examples), seed=0)
batch = [first.examples[index] for index in order.take(drawn=0, count=8)]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tutelage.errors import DataError

from trainer.prompts import BadRow, Exchange, alpaca_prompt, chat_messages, exchange_of, form_of, plain_prompt
from trainer.seeds import numpy_generator

Template = Literal["chat", "alpaca", "plain"]
TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    """Empty if the data has no completion; else ends with the end-of-sequence token unless truncated."""


@dataclass(frozen=True)
class Dataset:
    """Rows of one file, in the file's order."""

    examples: tuple[Example, ...]
    fingerprint: str
    """SHA-256, hex, of the token ids of all examples."""
    dropped_prompts: int
    """Rows left out because their prompt alone fills `max_tokens`."""
    truncated_completions: int
    """Rows whose completion lost its end."""
    tokens_cut: int
    """Completion tokens that truncation removed."""

    def split(self, *, held_out: int, seed: int) -> tuple[Dataset, tuple[Example, ...]]:
        """The rows to train on, and `held_out` seeded rows that are not among them.

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
        rest = tuple(example for index, example in enumerate(self.examples) if index not in held)
        return replace(self, examples=rest), tuple(self.examples[index] for index in sorted(held))


@dataclass(frozen=True)
class Order:
    """A seeded permutation per epoch, addressed by the number of examples drawn before."""

    size: int
    seed: int

    def take(self, drawn: int, count: int) -> list[int]:
        """Indices of the `count` examples that follow the first `drawn`."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(drawn + len(indices), self.size)
            permutation = numpy_generator(self.seed, "order", epoch).permutation(self.size)
            indices += permutation[offset : offset + count - len(indices)].tolist()
        return indices


def read_dataset(path: Path, tokenizer: Any, *, template: Template, max_tokens: int) -> Dataset:
    """Reads a `.jsonl`, `.json` (a list of rows) or `.parquet` file.

    Args:
        path: the file.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: `chat` applies the tokenizer's chat template, `alpaca` the prompt of LLM-Adapters,
            `plain` takes the last message as it is.
        max_tokens: prompt and completion together; longer completions lose their end, rows whose
            prompt leaves no room for one token are dropped.

    Raises:
        DataError: the file is missing, empty or of another kind; or a row is not as it must be, named
            by file, line (row, for Parquet and JSON lists) and field.

    """
    encode = encoder(tokenizer, template)
    encoded = [encode(exchange) for exchange in read_exchanges(path)]
    return _truncated(encoded, max_tokens, path)


def read_exchanges(path: Path) -> list[Exchange]:
    """The rows of a file, whichever form they have.

    Raises:
        DataError: as `read_dataset`.

    """
    form = None
    exchanges = []
    for where, row in _rows(path):
        try:
            form = form or form_of(row)
            exchanges.append(exchange_of(row, form))
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{path}, {where}: {problem}", field) from error
    if not exchanges:
        raise DataError(f"{path} holds no rows")
    return exchanges


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise DataError(f"{path} is none of {', '.join(readers)}; convert it to one of them")
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the path of a data set")
    for where, row in readers[path.suffix](path):
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
    import polars

    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error
    for number, row in enumerate(frame.iter_rows(named=True), start=1):
        yield f"row {number}", row


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}, {where}: is not JSON ({error})") from error


def encoder(tokenizer: Any, template: Template) -> Callable[[Exchange], Example]:
    """Turns an exchange into token ids; prompt and completion are tokenized apart, as sampling sees them."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if template == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; choose template: alpaca or plain", "data.template")

    def prompt_text(exchange: Exchange) -> str:
        if template == "chat":
            messages = chat_messages(exchange)
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return alpaca_prompt(exchange) if template == "alpaca" else plain_prompt(exchange)

    def ids(text: str, *, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    def encode(exchange: Exchange) -> Example:
        # A chat template writes its own special tokens.
        prompt = ids(prompt_text(exchange), special=template != "chat")
        completion = []
        if exchange.completion is not None:
            completion = [*ids(exchange.completion, special=False), tokenizer.eos_token_id]
        return Example(np.asarray(prompt, np.int32), np.asarray(completion, np.int32))

    return encode


def _truncated(examples: list[Example], max_tokens: int, path: Path) -> Dataset:
    kept, truncated, cut = [], 0, 0
    for example in examples:
        room = max_tokens - len(example.prompt_ids)
        if room < 1:
            continue
        over = max(0, len(example.completion_ids) - room)
        truncated, cut = truncated + (over > 0), cut + over
        kept.append(Example(example.prompt_ids, example.completion_ids[:room]))
    if not kept:
        raise DataError(f"every prompt of {path} fills {max_tokens} tokens; raise batch.max_tokens", "batch.max_tokens")
    return Dataset(tuple(kept), _fingerprint(kept), len(examples) - len(kept), truncated, cut)


def _fingerprint(examples: list[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.completion_ids):
            total.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return total.hexdigest()
