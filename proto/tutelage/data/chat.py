"""A conversation by a model's chat template: its tokens, and which of them the assistant wrote.

    rendered = render(conversation, tokenizer, Chat(kwargs={"enable_thinking": False}))
    rendered.ids, rendered.mask, rendered.prompt_tokens

Token ids are those of `apply_chat_template` up to the last token that is learned from: what a template writes after an
answer's end (a line's end, say) is predicted by nobody. Which tokens are the assistant's is read from the template's
generation marks where it has them (`{% generation %}`, as transformers' `return_assistant_tokens_mask`); else the
conversation is rendered prefix by prefix, and refused if the template writes a turn otherwise once others follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tutelage.data.conversations import REASONING, Conversation, Message, user_message
from tutelage.errors import DataError

if TYPE_CHECKING:  # numpy is imported where it is used: `Chat` is part of configurations, and `--help` reads those
    import numpy as np
    import numpy.typing as npt

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """How conversations are rendered."""

    template: str | None = None
    """Jinja text of a chat template; None means the tokenizer's own."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the template is given besides the conversation, such as `enable_thinking`; a row's own lie over it."""
    teacher_system: str | None = None
    """What the teacher is told before a conversation, and the student is not."""


OWN = Chat()
"""The tokenizer's template, with nothing besides."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    """Which tokens are learned from."""
    prompt_tokens: int
    """The first tokens, after which the last answer is written."""
    left_out: tuple[str, ...]
    """Fields of the conversation that the template leaves out by its design: reasoning of turns that are over."""


def template_of(tokenizer: Any, chat: Chat, tools: Any = None) -> str:
    """The Jinja text by which conversations are rendered.

    Raises:
        DataError: there is none.

    """
    if chat.template is not None:
        return chat.template
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template; give data.chat_template, or choose another data.template, such as "
            "plain or alpaca",
            "data.template",
        )
    # Of several by name the default one, and `tool_use` for rows with tools.
    return str(tokenizer.get_chat_template(None, tools))


def prompt_of(conversation: Conversation, tokenizer: Any, chat: Chat = OWN) -> str:
    """The text after which the assistant writes: what has been said, and the template's generation prompt.

    Raises:
        DataError: the template refuses the conversation, or loses some of it.

    """
    _refuse_unused(conversation, tokenizer, chat)
    _lost(conversation, conversation.messages, (), tokenizer, chat, generation_prompt=True)
    return _text(conversation, conversation.messages, tokenizer, chat, generation_prompt=True)


def render(conversation: Conversation, tokenizer: Any, chat: Chat = OWN) -> Rendered:
    """A conversation and its last answer, a message.

    Raises:
        DataError: the template refuses the conversation, loses some of it, or writes a turn that is learned from
            otherwise once others follow.

    """
    import numpy as np

    assert isinstance(conversation.completion, dict)
    _refuse_unused(conversation, tokenizer, chat)
    messages = [*conversation.messages, conversation.completion]
    learned = (*conversation.learned, len(messages) - 1)
    whole = _text(conversation, messages, tokenizer, chat)
    left_out = _lost(conversation, messages, learned, tokenizer, chat)
    _refuse_rewritten(conversation, messages, learned, whole)
    ids = np.asarray(tokenizer.encode(whole, add_special_tokens=False), np.int32)
    turns = _Turns(conversation, messages, tokenizer, chat, whole, ids)
    marked = _MARK.search(template_of(tokenizer, chat, conversation.tools)) is not None
    mask = turns.marked(learned) if marked else turns.between_prefixes(learned)
    prompt_tokens = turns.start(len(messages) - 1)
    end = int(np.flatnonzero(mask)[-1]) + 1
    return Rendered(ids[:end], mask[:end], prompt_tokens, left_out)


class _Turns:
    """Where the turns of one rendered conversation are in its tokens."""

    def __init__(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        tokenizer: Any,
        chat: Chat,
        whole: str,
        ids: npt.NDArray[np.int32],
    ) -> None:
        self._conversation, self._messages, self._tokenizer, self._chat = conversation, messages, tokenizer, chat
        self._whole, self._ids = whole, ids
        self._starts: dict[int, int] = {}

    def start(self, index: int) -> int:
        """How many tokens stand before what the assistant writes in a turn: those of its prompt.

        Raises:
            DataError: the conversation does not begin with them.

        """
        if index not in self._starts:
            self._starts[index] = self._prefix(index, self._messages[:index], generation_prompt=True)
        return self._starts[index]

    def between_prefixes(self, learned: Sequence[int]) -> npt.NDArray[np.bool_]:
        """The tokens of these turns up to what ends each, from rendering the conversation up to there."""
        import numpy as np

        mask = np.zeros(len(self._ids), bool)
        for index in learned:
            start = self.start(index)
            end = self._prefix(index, self._messages[: index + 1], generation_prompt=False)
            mask[start : self._closed(start, end)] = True
        return mask

    def marked(self, learned: Sequence[int]) -> npt.NDArray[np.bool_]:
        """The tokens that the template marks in these turns."""
        import numpy as np

        conversation = self._conversation
        encoded = self._tokenizer.apply_chat_template(
            list(self._messages),
            tools=conversation.tools,
            chat_template=self._chat.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **_kwargs(conversation, self._chat),
        )
        mask = np.asarray(encoded["assistant_masks"], bool)
        spoken = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        starts = np.flatnonzero(mask & ~np.append(False, mask[:-1]))
        if len(starts) != len(spoken):
            raise _refusal(
                conversation,
                "messages",
                f"holds {len(spoken)} turns of the assistant, of which the chat template marks {len(starts)} as "
                "generated; mend its generation marks, or take them out: then turns are found prefix by prefix",
            )
        for turn, start, after in zip(spoken, starts, [*starts[1:], len(mask)], strict=True):
            if turn not in learned:
                mask[start:after] = False
        return mask

    def _prefix(self, turn: int, messages: Sequence[Message], *, generation_prompt: bool) -> int:
        text = _text(self._conversation, messages, self._tokenizer, self._chat, generation_prompt=generation_prompt)
        if text == self._whole:
            return len(self._ids)
        field = f"messages[{turn}]"
        if not self._whole.startswith(text):
            at = _common(self._whole, text)
            when = "asks for it" if generation_prompt else "has it as the last message"
            raise _refusal(
                self._conversation,
                field,
                f"is written otherwise in the whole conversation than when the chat template {when}: "
                f"{self._whole[at : at + 30]!r} where that has {text[at : at + 30]!r}. Learn from the last turn alone "
                "(data.turns: last), or give a template that leaves earlier turns as they were (data.chat_template)",
            )
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if self._ids[: len(ids)].tolist() != ids:
            raise _refusal(
                self._conversation,
                field,
                f"begins or ends in the middle of a token: {text[-10:]!r} and {self._whole[len(text) :][:10]!r} are "
                "joined by the tokenizer, and a student would be asked after other tokens than it learns from; take "
                "white space away there",
            )
        return len(ids)

    def _closed(self, start: int, end: int) -> int:
        """One past the special token that ends a turn; what the template writes after it is white space."""
        special = self._tokenizer.get_added_vocab().values()
        for last in range(end - 1, start - 1, -1):
            if int(self._ids[last]) in special:
                return last + 1
            if self._tokenizer.decode(self._ids[last : last + 1]).strip():
                break
        return end


def _kwargs(conversation: Conversation, chat: Chat) -> dict[str, Any]:
    return {**chat.kwargs, **conversation.chat_template_kwargs}


def _text(
    conversation: Conversation,
    messages: Sequence[Message],
    tokenizer: Any,
    chat: Chat,
    *,
    tools: Any = None,
    generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    if not messages:  # what stands before the first message, if that is the assistant's
        return ""
    tools = tools or conversation.tools
    template = template_of(tokenizer, chat, tools)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **_kwargs(conversation, chat),
        )
    except (TemplateError, TypeError) as error:
        raise _refusal(conversation, "messages", f"is refused by the chat template: {error}") from error
    return str(text)


def _refuse_unused(conversation: Conversation, tokenizer: Any, chat: Chat) -> None:
    template = template_of(tokenizer, chat, conversation.tools)
    for name in _kwargs(conversation, chat):
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise _refusal(
                conversation, "data.chat_template_kwargs", f"{name} is no variable of the chat template; take it out"
            )


def _lost(
    conversation: Conversation,
    messages: Sequence[Message],
    learned: Sequence[int],
    tokenizer: Any,
    chat: Chat,
    *,
    generation_prompt: bool = False,
) -> tuple[str, ...]:
    """The fields that the template leaves out, found by writing a mark into each; those of the past, that it may.

    Raises:
        DataError: it leaves out another one.

    """
    marks = _Marks(json.dumps([messages, conversation.tools], default=str))
    marked = [marks.message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    tools = [marks.anywhere(tool, f"tools[{index}]") for index, tool in enumerate(conversation.tools or ())]
    text = _text(conversation, marked, tokenizer, chat, tools=tools or None, generation_prompt=generation_prompt)
    lost = [place for place, mark in marks.places.items() if mark not in text]
    kept_for = {f"messages[{index}]" for index in learned}
    allowed = [
        place for place in lost if place.rpartition(".")[2] in REASONING and place.partition(".")[0] not in kept_for
    ]
    for place in lost:
        if place not in allowed:
            raise _refusal(
                conversation,
                place,
                "is left out by the chat template and would be lost; give a template that writes it "
                "(data.chat_template), or take it out of the data",
            )
    return tuple(allowed)


class _Marks:
    """Marks in the texts of a conversation, by the field that each is in."""

    def __init__(self, content: str) -> None:
        self._stem = "mark"
        while self._stem in content:
            self._stem += "k"
        self.places: dict[str, str] = {}

    def message(self, message: Message, place: str) -> Message:
        """A message with a mark in all that it says; ids of calls only say what belongs together."""
        said = ["content", *REASONING, *([] if message["role"] == "tool" else ["name"])]
        marked = {**message, **{key: self._put(message[key], f"{place}.{key}") for key in said if message.get(key)}}
        if message.get("tool_calls"):
            marked["tool_calls"] = [
                self._call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(message["tool_calls"])
            ]
        return marked

    def anywhere(self, value: Any, place: str) -> Any:
        """A value with a mark in every text but those of JSON schema's own words."""
        match value:
            case str() if place.rpartition(".")[2] not in ("type", "$ref"):
                return self._put(value, place)
            case dict():
                return {key: self.anywhere(inner, f"{place}.{key}") for key, inner in value.items()}
            case _:
                return value

    def _call(self, call: dict[str, Any], place: str) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": self._call(call["function"], f"{place}.function")}
        named = {"name": self._put(call["name"], f"{place}.name")}
        arguments = call.get("arguments") or {}
        # In the names of arguments: their values may be numbers.
        put = {self._put(key, f"{place}.arguments.{key}"): value for key, value in arguments.items()}
        return {**call, **named, **({"arguments": put} if "arguments" in call else {})}

    def _put(self, text: str, place: str) -> str:
        if not text.strip():
            return text
        mark = self.places[place] = f"{self._stem}{len(self.places)}x"
        return f"{text}{mark}"


def _refuse_rewritten(
    conversation: Conversation, messages: Sequence[Message], learned: Sequence[int], whole: str
) -> None:
    """Refuses a template that keeps some of an answer only, such as what follows its thoughts."""
    dense = "".join(whole.split())
    for index in learned:
        for key in ("content", *REASONING):
            if "".join((messages[index].get(key) or "").split()) not in dense:
                raise _refusal(
                    conversation,
                    f"messages[{index}].{key}",
                    "is changed by the chat template, which keeps a part of it; thoughts belong into "
                    f"{REASONING[0]} for templates that read that",
                )


def _common(one: str, other: str) -> int:
    """Length of what two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _refusal(conversation: Conversation, field: str, problem: str) -> DataError:
    here = f"{conversation.where}: " if conversation.where else ""
    return DataError(f"{here}{problem}", field)


def turn_end_id(tokenizer: Any, chat: Chat = OWN) -> int | None:
    """The special token right after an assistant's answer; None if the template writes none."""
    answer = "An answer."
    messages = [user_message("A question?"), {"role": "assistant", "content": answer}]
    _, found, rest = _text(Conversation([], None), messages, tokenizer, chat).rpartition(answer)
    if not found:  # A template that rewrites or drops the answer says nothing of what follows it.
        return None
    closing = [token for token in tokenizer.get_added_vocab() if rest.lstrip().startswith(token)]
    return int(tokenizer.get_added_vocab()[max(closing, key=len)]) if closing else None
