"""From a row of a data file, in any of the formats people have, to a conversation.

| format | keys | prompt | completion |
|---|---|---|---|
| `messages` | `messages` | all before the last answer that is learned from | that answer, a message |
| `prompt` | `prompt`, optionally `completion` | `prompt` | `completion`; both texts, or lists of messages (TRL's) |
| `instruction` | `instruction`, optionally `input`, `output`, `answer` | `instruction`, `input` | `output` |
| `question` | `question`, optionally `answer` | `question` | `answer` |

A message has a `role` (`system`, `user`, `assistant`, `tool`) and `content`, and may have `reasoning_content` (or
`thinking`, whichever its model's template reads), `tool_calls`, `tool_call_id` and `name`; a row with messages may have
`tools` and `chat_template_kwargs`. What a row says that has no room here (images, a history) is refused: trained
without it, an answer would mean something else. Fields that say nothing to a model (ids, scores) are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Message = dict[str, Any]
Turns = Literal["all", "last", "marked"]
"""Which answers of a conversation are learned from: all, the last one, or those that say `train: true`."""

FORMATS = ("messages", "prompt", "instruction", "question")
ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
_READ_OF_MESSAGE = (*REASONING, "tool_calls", "tool_call_id", "name")
# Fields that chat templates and trainers of this field read (transformers' chat templating, TRL's data set formats,
# OpenAI's and LLaMA-Factory's files). Other fields (ids, sources, scores) say nothing to a student.
_UNREAD_OF_ROW = (
    "functions", "documents", "system", "history", "image", "images", "video", "videos", "audio", "audios",
)  # fmt: skip
_UNREAD_OF_MESSAGE = ("function_call", "image", "images", "video", "videos", "audio", "audios", "refusal")


class BadRow(ValueError):
    """A row that does not have its format; args are the field and what is wrong with it."""


@dataclass(frozen=True)
class Conversation:
    """A conversation so far, and what comes next."""

    messages: list[Message]
    """What comes before the answer."""
    completion: str | Message | None
    """The answer: a text that continues the prompt, or a message that a chat template writes. None if the data does not
    say."""
    instruction_input: str = ""
    """The `input` of the instruction format, which the Alpaca prompts set apart."""
    where: str = ""
    """Where it comes from, for messages: a file and its line, or an item."""
    learned: tuple[int, ...] = ()
    """Indices of the messages before the answer that are learned from as well."""
    tools: list[dict[str, Any]] | None = None
    """What the assistant may call, as JSON schemas."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the row gives the chat template besides."""
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


def conversation_of(row: Mapping[str, Any], row_format: str, where: str = "", turns: Turns = "all") -> Conversation:
    """The row as a conversation.

    Args:
        row: its fields.
        row_format: one of `FORMATS`.
        where: as in `Conversation`.
        turns: of messages, which answers are learned from.

    Raises:
        BadRow: a field is missing, empty or of another type; or the row says what no format here has room for.

    """
    if row_format not in row:
        raise BadRow(row_format, f"is missing; all rows of a file must have the first one's format, {row_format}")
    _refuse_unread(row, _UNREAD_OF_ROW, "")
    conversation = _said(row, row_format, turns)
    told = row.get("teacher_messages")
    return replace(
        conversation,
        where=where,
        tools=_tools(row),
        chat_template_kwargs=_mapping(row.get("chat_template_kwargs"), "chat_template_kwargs"),
        teacher=_optional_text(row, "teacher"),
        teacher_prompt=_optional_text(row, "teacher_prompt"),
        teacher_messages=None if told is None else tuple(_messages(told, "teacher_messages")),
    )


def _said(row: Mapping[str, Any], row_format: str, turns: Turns) -> Conversation:
    match row_format:
        case "messages":
            return _turns(_messages(row["messages"], "messages"), row["messages"], turns)
        case "prompt" if isinstance(row["prompt"], list):
            return _prompt_and_completion(row, turns)
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
    answer = {"role": "assistant", "content": completion}
    match row_format:
        case "messages":
            messages = list(row["messages"])
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return {**row, "messages": [*asked, answer]}
        case "prompt" if isinstance(row["prompt"], list):
            return {**row, "completion": [answer]}
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
    for name in fields:
        if values.get(name):  # Tables have every field in every row, most of them null.
            raise BadRow(
                f"{prefix}{name}",
                f"says {values[name]!r:.80}, which would be lost: it is not learned from here; leave such rows out, "
                "or write it into the text",
            )


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise BadRow(field, f"holds {value!r:.80}, expected an object with named fields")
    return {key: inner for key, inner in (value or {}).items() if inner is not None}


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools: a list of JSON schemas, or the same as JSON text, which tables should have."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", f"holds {tools!r:.80}, expected a list of JSON schemas")
    return tools


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(field, f"holds {text!r:.80}, which is not JSON ({error})") from error


def _messages(messages: Any, field: str) -> list[Message]:
    """Messages with their known fields, all of them checked."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(field, f"holds {messages!r:.80}, expected a list that is not empty")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(place, f"is {message!r:.80}, expected strings `role` and `content`")
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(f"{place}.role", f"is {role!r:.80}, expected one of {', '.join(ROLES)}")
    _refuse_unread(message, _UNREAD_OF_MESSAGE, f"{place}.")
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and calls:  # as OpenAI's files have it; templates that print content would print "None"
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{place}.content", f"is {content!r:.80}, expected strings `role` and `content`")
    known: Message = {"role": role, "content": content}
    for key in _READ_OF_MESSAGE:
        value = message.get(key)
        if not value:
            continue
        if key in (*REASONING, "tool_calls") and role != "assistant":
            raise BadRow(f"{place}.{key}", f"says {value!r:.80}, which only the assistant does")
        if key == "tool_calls":
            known[key] = _calls(value, f"{place}.{key}")
        elif isinstance(value, str):
            known[key] = value
        else:
            raise BadRow(f"{place}.{key}", f"is {value!r:.80}, expected a string")
    return known


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls; arguments that are JSON text (OpenAI's) become the object that chat templates expect."""
    if not isinstance(calls, list):
        raise BadRow(place, f"is {calls!r:.80}, expected a list of calls")
    made = []
    for index, call in enumerate(calls):
        here = f"{place}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(here, f"is {call!r:.80}, expected a `function` with a `name` and `arguments`")
        given = function.get("arguments")
        arguments = _json(given, f"{here}.arguments") if isinstance(given, str) and given.strip() else given or {}
        if not isinstance(arguments, dict):
            raise BadRow(f"{here}.arguments", f"is {given!r:.80}, expected an object, or one as JSON text")
        function = {**function, "arguments": arguments}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def _turns(messages: list[Message], given: Sequence[Mapping[str, Any]], turns: Turns, first: int = 0) -> Conversation:
    """The conversation up to the last answer that is learned from; whole, if it ends with nobody's answer.

    Args:
        messages: all of it.
        given: the same as the row has them, where they may say `train`.
        turns: which answers are learned from.
        first: answers before this one are not.

    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    if messages[-1]["role"] != "assistant" and turns != "marked" and not first:
        return Conversation(messages, None)
    if turns == "marked":
        learned = [index for index in answers if given[index].get("train")]
        if not learned:
            raise BadRow("messages", "has no answer with train: true, and data.turns: marked learns from those alone")
    else:
        learned = answers if turns == "all" else answers[-1:]
        for index in answers:
            if given[index].get("train") not in (None, index in learned):
                raise BadRow(
                    f"messages[{index}].train",
                    f"is {given[index]['train']}, which data.turns: {turns} does not look at; say data.turns: marked",
                )
    for index in learned:
        if index == 0:
            raise BadRow(
                "messages",
                "begins with the assistant's message; what does it answer? Leave it out of what is learned from "
                "(data.turns: last, or train: false with data.turns: marked)",
            )
        if not messages[index]["content"].strip() and not messages[index].get("tool_calls"):
            raise BadRow(f"messages[{index}].content", "is empty, and would teach to end at once")
    last = learned[-1]
    return Conversation(messages[:last], messages[last], learned=tuple(learned[:-1]))


def _prompt_and_completion(row: Mapping[str, Any], turns: Turns) -> Conversation:
    prompt = _messages(row["prompt"], "prompt")
    if row.get("completion") is None:
        return Conversation(prompt, None)
    completion = _messages(row["completion"], "completion")
    if not any(message["role"] == "assistant" for message in completion):
        raise BadRow("completion", "has no message of the assistant, so there is nothing to learn from")
    return _turns([*prompt, *completion], [*row["prompt"], *row["completion"]], turns, first=len(prompt))
