"""A text as the beginning of a sequence: tokenized so that something can be continued after it."""

from __future__ import annotations

from typing import Any


def beginning_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with what the tokenizer puts before it, once, and without what it puts after it.

    A tokenizer may append its end token to every text, after which a model has nothing to say; and a text that spells
    the begin token out would have it twice.

    Args:
        tokenizer: a transformers tokenizer.
        text: of a prompt or a context, without special tokens of a chat template.

    """
    own: list[int] = tokenizer.encode(text, add_special_tokens=False)
    with_special: list[int] = tokenizer.encode(text)
    if with_special == own:
        return own
    starts = range(len(with_special) - len(own) + 1)
    start = next((start for start in starts if with_special[start : start + len(own)] == own), None)
    if start is None:  # a tokenizer that marks the text's first token differently; nothing can be told apart
        return with_special
    before = with_special[:start]
    return own if own[:start] == before else before + own
