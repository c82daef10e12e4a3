"""From a row of a data file, in any of the formats people have, to a conversation.

| format | keys | prompt | completion |
|---|---|---|---|
| `messages` | `messages` | all but the last message | the last, the assistant's |
| `prompt` | `prompt`, optionally `completion` | `prompt` | `completion` |
| `instruction` | `instruction`, optionally `input`, `output`, `answer` | `instruction`, `input` | `output` |
| `question` | `question`, optionally `answer` | `question` | `answer` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


class BadRow(ValueError):
    """A row that does not have its format; args are the field and what is wrong with it."""


@dataclass(frozen=True)
class Conversation:
    """A conversation so far, and what comes next (None if the data does not say)."""

    messages: list[Message]
    completion: str | None
    instruction_input: str = ""
    """The `input` of the instruction format, which the Alpaca prompts set apart."""


def format_of(row: Mapping[str, Any]) -> str:
    """The format whose key a row has.

    Raises:
        BadRow: it has none of them.

    """
    for row_format in ("messages", "prompt", "instruction", "question"):
        if row_format in row:
            return row_format
    raise BadRow("", f"has the keys {sorted(row)}, but none of messages, prompt, instruction, question")


def conversation_of(row: Mapping[str, Any], row_format: str) -> Conversation:
    """The row as a conversation.

    Raises:
        BadRow: a field is missing, empty or no string.

    """
    match row_format:
        case "messages":
            return _from_messages(row)
        case "prompt":
            return Conversation([user_message(_text(row, "prompt"))], _optional_text(row, "completion"))
        case "instruction":
            return _from_instruction(row)
        case _:
            return Conversation([user_message(_text(row, "question"))], _optional_text(row, "answer"))


def with_completion(row: Mapping[str, Any], row_format: str, completion: str) -> dict[str, Any]:
    """A row with the same prompt and this completion; a question becomes a `prompt` row."""
    match row_format:
        case "messages":
            messages = list(row["messages"])
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return {"messages": [*asked, {"role": "assistant", "content": completion}]}
        case "prompt":
            return {"prompt": row["prompt"], "completion": completion}
        case "instruction":
            return {"instruction": row["instruction"], "input": row.get("input", ""), "output": completion}
        case _:
            return {"prompt": row["question"], "completion": completion}


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


def _from_instruction(row: Mapping[str, Any]) -> Conversation:
    extra = row.get("input", "")
    if not isinstance(extra, str):
        raise BadRow("input", f"holds {extra!r:.80}, expected a string")
    return Conversation([user_message(_text(row, "instruction"))], _optional_text(row, "output"), extra)


def _from_messages(row: Mapping[str, Any]) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages", f"holds {messages!r:.80}, expected a list that is not empty")
    clean = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadRow(f"messages[{index}]", f"is {message!r:.80}, expected strings `role` and `content`")
        clean.append({"role": message["role"], "content": message["content"]})
    if clean[-1]["role"] != "assistant":
        return Conversation(clean, None)
    if len(clean) == 1:
        raise BadRow("messages", "holds only the assistant's message; what does it answer?")
    return Conversation(clean[:-1], clean[-1]["content"])
