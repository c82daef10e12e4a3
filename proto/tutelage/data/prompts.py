"""From a row of a data file, in any of the forms people have, to messages or a prompt's text.

| form | keys | prompt | completion |
|---|---|---|---|
| `messages` | `messages` | all but the last message | the last, the assistant's |
| `prompt` | `prompt`, optionally `completion` | `prompt` | `completion` |
| `instruction` | `instruction`, optionally `input`, `output`, `answer` | `instruction`, `input` | `output` |
| `question` | `question`, optionally `answer` | `question` | `answer` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Template = Literal["chat", "alpaca", "plain"]
Message = dict[str, str]


class BadRow(ValueError):
    """A row that does not have its form; args are the field and what is wrong with it."""


@dataclass(frozen=True)
class Exchange:
    """A conversation so far, and what comes next (None if the data does not say)."""

    messages: list[Message]
    completion: str | None
    instruction_input: str = ""
    """The `input` of the instruction form, which the Alpaca prompt sets apart."""


def form_of(row: Mapping[str, Any]) -> str:
    """The form whose key a row has.

    Raises:
        BadRow: it has none of them.

    """
    for form in ("messages", "prompt", "instruction", "question"):
        if form in row:
            return form
    raise BadRow("", f"has the keys {sorted(row)}, but none of messages, prompt, instruction, question")


def exchange_of(row: Mapping[str, Any], form: str) -> Exchange:
    """The row as an exchange.

    Raises:
        BadRow: a field is missing, empty or no string.

    """
    match form:
        case "messages":
            return _from_messages(row)
        case "prompt":
            return Exchange([_user(_text(row, "prompt"))], _optional_text(row, "completion"))
        case "instruction":
            return _from_instruction(row)
        case _:
            return Exchange([_user(_text(row, "question"))], _optional_text(row, "answer"))


def with_completion(row: Mapping[str, Any], form: str, completion: str) -> dict[str, Any]:
    """A row with the same prompt and this completion; a question becomes a `prompt` row."""
    match form:
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


def alpaca_prompt(exchange: Exchange) -> str:
    """The prompt of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), its leaked indentation included."""
    indent = " " * 16
    has_input = bool(exchange.instruction_input)
    header = "Below is an instruction that describes a task" + (
        ", paired with an input that provides further context. " if has_input else ". "
    )
    sections = [("Instruction", exchange.messages[-1]["content"])]
    if has_input:
        sections.append(("Input", exchange.instruction_input))
    body = "".join(f"{indent}### {name}:\n{indent}{text}\n{indent}\n" for name, text in sections)
    request = "Write a response that appropriately completes the request. "
    return f"{header}{request}\n\n{body}{indent}### Response:\n{indent}"


def plain_prompt(exchange: Exchange) -> str:
    """The last message, as it is."""
    return exchange.messages[-1]["content"]


def chat_messages(exchange: Exchange) -> list[Message]:
    """The messages, with the instruction form's `input` on lines of its own."""
    if not exchange.instruction_input:
        return exchange.messages
    return [_user(f"{exchange.messages[-1]['content']}\n\n{exchange.instruction_input}")]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(field, f"holds {value!r:.80}, expected a string that is not empty")
    return value


def _optional_text(row: Mapping[str, Any], field: str) -> str | None:
    return _text(row, field) if row.get(field) is not None else None


def _from_instruction(row: Mapping[str, Any]) -> Exchange:
    extra = row.get("input", "")
    if not isinstance(extra, str):
        raise BadRow("input", f"holds {extra!r:.80}, expected a string")
    return Exchange([_user(_text(row, "instruction"))], _optional_text(row, "output"), extra)


def _from_messages(row: Mapping[str, Any]) -> Exchange:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages", f"holds {messages!r:.80}, expected a list that is not empty")
    clean = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadRow(f"messages[{index}]", f"is {message!r:.80}, expected strings `role` and `content`")
        clean.append({"role": message["role"], "content": message["content"]})
    if clean[-1]["role"] != "assistant":
        return Exchange(clean, None)
    if len(clean) == 1:
        raise BadRow("messages", "holds only the assistant's message; what does it answer?")
    return Exchange(clean[:-1], clean[-1]["content"])
