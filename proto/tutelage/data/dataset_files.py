"""A data set as token ids: the same for the trainer that learns from it and the teacher that scores it ahead.

`read_examples(path, tokenizer, template="chat")` gives prompt and completion of each row, in the data set's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.chat import OWN, Chat, render
from tutelage.data.conversations import BadRow, Conversation, Turns, conversation_of, format_of, user_message
from tutelage.data.prompts import Template, completion_end_id, prompt_ids, prompt_text
from tutelage.data.rows import WHOLE, Part, read_rows
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
    teacher_prompt_ids: TokenIds | None = None
    """What the teacher reads in place of the prompt; None means the prompt."""
    left_out: tuple[str, ...] = ()
    """Fields that the chat template leaves out by its design: reasoning of turns that are over."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The row as it stands in the data, for who writes with the student."""


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
    """As `stream_examples`, all at once."""
    return list(stream_examples(path, tokenizer, template=template))


def stream_examples(
    path: Path, tokenizer: Any, *, template: Template, chat: Chat = OWN, turns: Turns = "all", part: Part = WHOLE
) -> Iterator[TokenizedExample]:
    """The rows of a data set as token ids, one after the other.

    Args:
        path: as `tutelage.data.rows.read_rows`.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: as `tutelage.data.prompts` has them.
        chat: under `chat`, how conversations are rendered.
        turns: of messages, which answers are learned from.
        part: of a data set that has several.

    Raises:
        DataError: it is missing, empty or of another kind; or a row is not as it must be, or says what the template
            would lose; named by file, line (row, for tables and JSON lists) and field.

    """
    tokenized = tokenizer_of(tokenizer, template, chat)
    for values, conversation in conversations(path, turns, part):
        yield replace(tokenized(conversation), values=values)


def tokenizer_of(tokenizer: Any, template: Template, chat: Chat = OWN) -> Callable[[Conversation], TokenizedExample]:
    """Turns a conversation into token ids; what it raises is as `prompt_text` and `tutelage.data.chat.render`."""
    end_id = completion_end_id(template, tokenizer, chat)
    encode_prompt = prompt_encoder(tokenizer, template, chat)

    def tokenized(conversation: Conversation) -> TokenizedExample:
        completion, mask = conversation.completion, None
        left_out: tuple[str, ...] = ()
        if template == "chat" and isinstance(completion, dict):
            rendered = render(conversation, tokenizer, chat)
            prompt_ids, completion_ids = np.split(rendered.ids, [rendered.prompt_tokens])
            mask = None if rendered.mask[rendered.prompt_tokens :].all() and not conversation.learned else rendered.mask
            left_out = rendered.left_out
        else:
            prompt_ids, completion_ids = encode_prompt(conversation), np.zeros(0, np.int32)
            if completion is not None:
                # Prompt and completion are tokenized apart, as sampling sees them: it begins after whole tokens.
                text = completion["content"] if isinstance(completion, dict) else completion
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                completion_ids = np.asarray(ids if ids[-1:] == [end_id] else [*ids, end_id], np.int32)
        return TokenizedExample(
            prompt_ids,
            completion_ids,
            mask,
            conversation.teacher,
            told_to_teacher(conversation, prompt_ids, completion_ids, mask),
            left_out,
        )

    def told_to_teacher(
        conversation: Conversation, prompt_ids: TokenIds, completion_ids: TokenIds, mask: Mask | None
    ) -> TokenIds | None:
        told = as_told_to_the_teacher(conversation, template, chat)
        if told is None:
            return None
        ids = encode_prompt(told)
        # Earlier answers that are learned from are part of the prompt, and of both.
        learned = np.flatnonzero(np.ones(0) if mask is None else mask[: len(prompt_ids)])
        shared = prompt_ids[learned[0] :] if len(learned) else prompt_ids[:0]
        if len(shared) >= len(ids) or not np.array_equal(ids[len(ids) - len(shared) :], shared):
            raise DataError(
                f"{conversation.where}: several of its answers are learned from, and what the teacher reads has other "
                "tokens from the first of them on; learn from the last one (data.turns: last)",
                "teacher_prompt" if conversation.teacher_prompt else "teacher_messages",
            )
        _require_same_border(tokenizer, ids, completion_ids, conversation.where)
        return ids

    return tokenized


def as_told_to_the_teacher(conversation: Conversation, template: Template, chat: Chat) -> Conversation | None:
    """What the teacher reads in place of the conversation so far; None if it reads the same.

    Raises:
        DataError: the row says it twice.

    """
    if conversation.teacher_prompt is not None and conversation.teacher_messages is not None:
        raise DataError(f"{conversation.where}: has teacher_prompt and teacher_messages; give one", "teacher_prompt")
    if conversation.teacher_prompt is not None:
        messages = [user_message(conversation.teacher_prompt)]
    elif conversation.teacher_messages is not None:
        messages = list(conversation.teacher_messages)
    elif chat.teacher_system is not None and template == "chat":
        messages = list(conversation.messages)
        own = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        system = chat.teacher_system if own is None else f"{chat.teacher_system}\n\n{own}"
        return replace(conversation, messages=[{"role": "system", "content": system}, *messages], completion=None)
    else:
        return None
    return replace(conversation, messages=messages, completion=None, instruction_input="")


def _require_same_border(tokenizer: Any, teacher_prompt_ids: TokenIds, completion_ids: TokenIds, where: str) -> None:
    """Refuses a completion whose first tokens would be others right after the teacher's prompt."""
    text = tokenizer.decode(completion_ids)
    alone = tokenizer.encode(text, add_special_tokens=False)
    if alone != completion_ids.tolist():  # No text that is tokenized in one way, such as one that was cut.
        return
    prompt = tokenizer.decode(teacher_prompt_ids)
    joint = tokenizer.encode(prompt + text, add_special_tokens=False)
    if joint[len(joint) - len(alone) :] != alone:
        raise DataError(
            f"{where}: after the teacher's prompt the completion's tokens would be others than after the student's "
            f"({prompt[-20:]!r} before {text[:20]!r}); let the teacher's prompt end as the student's does",
            "teacher_prompt",
        )


def read_conversations(path: Path) -> list[tuple[dict[str, Any], Conversation]]:
    """As `conversations`, all at once."""
    return list(conversations(path))


def conversations(
    path: Path, turns: Turns = "all", part: Part = WHOLE
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """Each row of a data set, as it stands there and as a conversation; all have the first one's format.

    Raises:
        DataError: as `stream_examples`.

    """
    row_format = None
    for row in read_rows(path, part):
        try:
            row_format = row_format or format_of(row.values)
            conversation = conversation_of(row.values, row_format, row.where, turns)
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{row.where}: {problem}", field) from error
        yield row.values, conversation
    if row_format is None:
        raise DataError(f"{path} holds no rows")


def truncate(examples: Iterable[TokenizedExample], max_tokens: int, path: Path) -> Truncation:
    """Examples whose prompt and completion have at most `max_tokens` together.

    Longer completions lose their end; rows whose prompt leaves no room for one token are dropped.

    Raises:
        DataError: that is every row.

    """
    kept, dropped, truncated, tokens_cut = [], 0, 0, 0
    for example in examples:
        short = shortened(example, max_tokens)
        if short is None:
            dropped += 1
            continue
        cut = len(example.completion_ids) - len(short.completion_ids)
        truncated, tokens_cut = truncated + (cut > 0), tokens_cut + cut
        kept.append(short)
    if not kept:
        raise DataError(f"every prompt of {path} fills {max_tokens} tokens; raise batch.max_tokens", "batch.max_tokens")
    return Truncation(tuple(kept), dropped, truncated, tokens_cut)


def shortened(example: TokenizedExample, max_tokens: int) -> TokenizedExample | None:
    """An example of at most `max_tokens`; None if nothing that is learned from is left of it."""
    room = max_tokens - len(example.prompt_ids)
    if room < 1:
        return None
    length = len(example.prompt_ids) + min(room, len(example.completion_ids))
    mask = None if example.mask is None else example.mask[:length]
    if mask is not None and not mask.any():
        return None
    return replace(example, completion_ids=example.completion_ids[:room], mask=mask)


def prompt_encoder(tokenizer: Any, template: Template, chat: Chat = OWN) -> Callable[[Conversation], TokenIds]:
    """Turns the prompt of a conversation into token ids; what it raises is as `prompt_text`."""
    return lambda conversation: np.asarray(
        prompt_ids(template, prompt_text(template, conversation, tokenizer, chat), tokenizer), np.int32
    )
