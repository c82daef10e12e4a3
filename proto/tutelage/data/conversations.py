"""From a row of a data file, in any of the formats people have, to a conversation.

| format | keys | prompt | completion |
|---|---|---|---|
| `messages` | `messages` | all but the last message | the last, the assistant's |
| `prompt` | `prompt`, optionally `completion` | `prompt` | `completion` |
| `instruction` | `instruction`, optionally `input`, `output`, `answer` | `instruction`, `input` | `output` |
| `question` | `question`, optionally `answer` | `question` | `answer` |

What a row says besides (tool calls, reasoning, images, a history) is not built yet, and a row that has it is refused:
trained without it, an answer that is a tool call would teach to say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]

FORMATS = ("messages", "prompt", "instruction", "question")
ROLES = ("system", "user", "assistant")
# Fields that chat templates and trainers of this field read (transformers' chat templating, TRL's data set formats,
# OpenAI's and LLaMA-Factory's files). Other fields (ids, sources, scores) say nothing to a student.
_UNREAD_OF_ROW = (
    "tools", "functions", "documents", "chat_template_kwargs", "system", "history", "image", "images", "video",
    "videos", "audio", "audios",
)  # fmt: skip
_UNREAD_OF_MESSAGE = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "name", "image",
    "images", "video", "videos", "audio", "audios", "refusal",
)  # fmt: skip


class BadRow(ValueError):
    """A row that does not have its format; args are the field and what is wrong with it."""


@dataclass(frozen=True)
class Conversation:
    """A conversation so far, and what comes next (None if the data does not say)."""

    messages: list[Message]
    completion: str | None
    instruction_input: str = ""
    """The `input` of the instruction format, which the Alpaca prompts set apart."""
    where: str = ""
    """Where it comes from, for messages: a file and its line, or an item."""
    teacher: str | None = None
    """Name of the teacher that is asked about it; None means the run's one."""
    teacher_prompt: str | None = None
    """What the teacher reads in place of the prompt; None means the prompt."""
    teacher_messages: tuple[Message, ...] | None = None
    """The same as messages."""


def format_of(row: Mapping[str, Any]) -> str:
    """The format whose key a row has.

    Raises:
        BadRow: it has none of them.

    """
    for row_format in FORMATS:
        if row_format in row:
            return row_format
    raise BadRow("", f"has the keys {sorted(row)}, but none of {', '.join(FORMATS)}")


def conversation_of(row: Mapping[str, Any], row_format: str, where: str = "") -> Conversation:
    """The row as a conversation.

    Raises:
        BadRow: a field is missing, empty or no string; or the row says what no format here has room for.

    """
    if row_format not in row:
        raise BadRow(row_format, f"is missing; all rows of a file must have the first one's format, {row_format}")
    _refuse_unread(row, _UNREAD_OF_ROW, "")
    conversation = _said(row, row_format)
    told = row.get("teacher_messages")
    return replace(
        conversation,
        where=where,
        teacher=_optional_text(row, "teacher"),
        teacher_prompt=_optional_text(row, "teacher_prompt"),
        teacher_messages=None if told is None else tuple(_messages(told, "teacher_messages")),
    )


def _said(row: Mapping[str, Any], row_format: str) -> Conversation:
    match row_format:
        case "messages":
            return Conversation(*_turns(row["messages"]))
        case "prompt":
            return Conversation([user_message(_text(row, "prompt"))], _optional_text(row, "completion"))
        case "instruction":
            extra = row.get("input") or ""
            if not isinstance(extra, str):
                raise BadRow("input", f"holds {extra!r:.80}, expected a string")
            return Conversation([user_message(_text(row, "instruction"))], _optional_text(row, "output"), extra)
        case _:
            return Conversation([user_message(_text(row, "question"))], _optional_text(row, "answer"))


def with_completion(row: Mapping[str, Any], row_format: str, completion: str) -> dict[str, Any]:
    """The row with this completion in place of its own.

    A question becomes a `prompt` row. All else that the row says stays: its id, the answer that is known to be right.
    """
    match row_format:
        case "messages":
            messages = list(row["messages"])
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return {**row, "messages": [*asked, {"role": "assistant", "content": completion}]}
        case "prompt":
            return {**row, "completion": completion}
        case "instruction":
            return {**row, "output": completion}
        case _:
            rest = {name: value for name, value in row.items() if name != "question"}
            return {"prompt": row["question"], "completion": completion, **rest}


def user_message(text: str) -> Message:
    """What a user says, as one message."""
    return {"role": "user", "content": text}


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(field, f"holds {value!r:.80}, expected a string that is not empty")
    return value


def _optional_text(row: Mapping[str, Any], field: str) -> str | None:
    return _text(row, field) if row.get(field) is not None else None


def _refuse_unread(values: Mapping[str, Any], fields: Sequence[str], prefix: str) -> None:
    for field in fields:
        if values.get(field):  # Tables have every field in every row, most of them null.
            raise BadRow(
                f"{prefix}{field}",
                f"says {values[field]!r:.80}, which would be lost: only roles and their text are learned from yet; "
                "leave such rows out, or write it into the text",
            )


def _messages(messages: Any, field: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise BadRow(field, f"holds {messages!r:.80}, expected a list that is not empty")
    turns = []
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise BadRow(place, f"is {message!r:.80}, expected strings `role` and `content`")
        if message.get("role") not in ROLES:
            raise BadRow(f"{place}.role", f"is {message.get('role')!r:.80}, expected one of {', '.join(ROLES)}")
        _refuse_unread(message, _UNREAD_OF_MESSAGE, f"{place}.")
        if not isinstance(message.get("content"), str):
            problem = f"is {message.get('content')!r:.80}, expected strings `role` and `content`"
            raise BadRow(f"{place}.content", problem)
        turns.append({"role": message["role"], "content": message["content"]})
    return turns


def _turns(messages: Any) -> tuple[list[Message], str | None]:
    """What comes before the answer, and the answer; None if the last message is not the assistant's."""
    turns = _messages(messages, "messages")
    if turns[-1]["role"] != "assistant":
        return turns, None
    if len(turns) == 1:
        raise BadRow("messages", "holds only the assistant's message; what does it answer?")
    if not turns[-1]["content"].strip():
        raise BadRow(f"messages[{len(turns) - 1}].content", "is empty, and would teach to end at once")
    return turns[:-1], turns[-1]["content"]
