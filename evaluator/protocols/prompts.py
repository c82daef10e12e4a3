"""The named prompt templates. A row says which one its item was asked with."""

from __future__ import annotations

from typing import Any, Literal

Template = Literal["alpaca_leaked_indentation", "alpaca", "chat"]

_HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
# LLM-Adapters' evaluation scripts build their prompt in an indented string literal, so sixteen spaces stand
# before every line but the first and the blank ones, and generation starts after sixteen spaces. Only the
# header without an input ends in a space.
_LEAK = " " * 16


def alpaca(instruction: str, context: str) -> str:
    """Stanford Alpaca's prompt (Taori et al. 2023)."""
    if not context:
        return f"{_HEADER}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return f"{_HEADER_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def alpaca_leaked_indentation(instruction: str, context: str) -> str:
    """Character for character what LLM-Adapters' evaluation scripts send."""
    middle = f"{_LEAK}### Input:\n{_LEAK}{context}\n\n" if context else ""
    return (
        f"{_HEADER_WITH_INPUT if context else _HEADER + ' '}\n\n"
        f"{_LEAK}### Instruction:\n{_LEAK}{instruction}\n\n{middle}{_LEAK}### Response:\n{_LEAK}"
    )


def prompt_of(template: Template, instruction: str, context: str, tokenizer: Any) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer adds its special tokens (a chat template brings its own)."""
    if template == "chat":
        content = f"{instruction}\n\n{context}" if context else instruction
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
    write = alpaca_leaked_indentation if template == "alpaca_leaked_indentation" else alpaca
    return write(instruction, context), True
