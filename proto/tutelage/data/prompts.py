"""The prompt templates by name: what a trainer learns from, a teacher continues and an evaluator asks is the same text.

| template | prompt |
|---|---|
| `chat` | the tokenizer's own chat template, with the generation prompt |
| `plain` | the message, as it is |
| `alpaca` | Stanford Alpaca's (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca) |
| `alpaca_leaked_indentation` | LLM-Adapters' when it evaluates (Hu et al. 2023, arXiv 2304.01933; `evaluate.py`) |
| `alpaca_leaked_indentation_training` | LLM-Adapters' when it trains (`finetune.py`) |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from tutelage.data.chat import OWN, Chat, prompt_of, turn_end_id
from tutelage.data.conversations import Conversation, user_message
from tutelage.data.tokens import beginning_ids
from tutelage.errors import DataError

Template = Literal["chat", "plain", "alpaca", "alpaca_leaked_indentation", "alpaca_leaked_indentation_training"]

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
# LLM-Adapters writes its prompts as string literals inside indented functions, so sixteen spaces stand before every
# line but the first, and an answer begins after sixteen spaces. When it trains, they stand on the blank lines too; and
# its editor left a different number of spaces at the end of each of the four headers. All of it is tokens.
_LEAK = " " * 16


def prompt_text(template: Template, conversation: Conversation, tokenizer: Any, chat: Chat = OWN) -> str:
    """The prompt of a conversation, before it is tokenized.

    Args:
        template: one of the module's table.
        conversation: what has been said so far; its completion is not looked at.
        tokenizer: a transformers tokenizer; only `chat` uses it.
        chat: under `chat`, how the conversation is rendered.

    Raises:
        DataError: as `tutelage.data.chat.prompt_of`; or another template has no room for what was said.

    """
    here = f"{conversation.where}: " if conversation.where else ""
    if template != "chat":
        _refuse_more_than_text(template, conversation)
    match template:
        case "chat":
            if conversation.instruction_input:  # on lines of its own
                message = user_message(f"{conversation.messages[-1]['content']}\n\n{conversation.instruction_input}")
                conversation = replace(conversation, messages=[message])
            return prompt_of(conversation, tokenizer, chat)
        case "plain":
            if conversation.instruction_input:
                raise DataError(
                    f"{here}has an input, which the template plain would not show; use alpaca or chat, or write it "
                    "into the instruction",
                    "input",
                )
            return str(conversation.messages[-1]["content"])
        case "alpaca":
            return _alpaca(conversation)
        case "alpaca_leaked_indentation":
            return _alpaca(conversation, leak=_LEAK, header_end="" if conversation.instruction_input else " ")
        case "alpaca_leaked_indentation_training":
            header_end = " " if conversation.instruction_input else "  "
            return _alpaca(conversation, leak=_LEAK, blank=_LEAK, header_end=header_end)


def prompt_ids(template: Template, text: str, tokenizer: Any) -> list[int]:
    """The token ids of a prompt that `prompt_text` made; a chat template writes its own special tokens."""
    if template == "chat":
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    return beginning_ids(tokenizer, text)


def _refuse_more_than_text(template: Template, conversation: Conversation) -> None:
    here = f"{conversation.where}: " if conversation.where else ""
    if len(conversation.messages) > 1:
        raise DataError(
            f"{here}holds {len(conversation.messages)} messages before the answer, of which the template {template} "
            "would show the last alone; use the template chat, or rows of one turn",
            "messages",
        )
    answer = conversation.completion if isinstance(conversation.completion, dict) else {}
    besides = [*({**conversation.messages[0], **answer}.keys() - {"role", "content"})]
    besides += ["tools"] * bool(conversation.tools)
    besides += ["chat_template_kwargs"] * bool(conversation.chat_template_kwargs)
    if besides:
        raise DataError(
            f"{here}says {', '.join(sorted(besides))}, which the template {template} would not show; use the template "
            "chat",
            besides[0],
        )


def completion_end_id(template: Template, tokenizer: Any, chat: Chat = OWN) -> int:
    """The token that ends a completion: under `chat` what closes an assistant's turn, else the tokenizer's end token.

    The two often differ: Qwen2.5's base models close turns with <|im_end|> and have <|endoftext|> for their end token.
    One that is taught the latter goes on after its answer wherever it is asked by its template.

    Raises:
        DataError: the tokenizer has no end token.

    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    has_template = chat.template is not None or tokenizer.chat_template
    closing = turn_end_id(tokenizer, chat) if template == "chat" and has_template else None
    return int(tokenizer.eos_token_id if closing is None else closing)


def _alpaca(conversation: Conversation, *, leak: str = "", blank: str = "", header_end: str = "") -> str:
    """Alpaca's words, with what stands before each line, on each blank line, and after the first line."""
    context = conversation.instruction_input
    header = f"{_TASK}{_CONTEXT if context else ''}{_REQUEST}{header_end}\n\n"
    sections = [("Instruction", conversation.messages[-1]["content"]), *([("Input", context)] if context else [])]
    body = "".join(f"{leak}### {name}:\n{leak}{text}\n{blank}\n" for name, text in sections)
    return f"{header}{body}{leak}### Response:\n{leak}"
