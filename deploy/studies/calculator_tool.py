"""A student that has a calculator: an example of `sampling.rollout: tutelage.studies.calculator_tool:rollout`.

The assistant's turn is a sum to work out, such as `17+25`; a `tool` turn answers it, and the assistant goes on. A turn
that is no sum is the answer, and ends the sequence. What the tool wrote is in the sequence, but not in the mask: the
student reads it and does not learn to say it. Turns are written as ChatML, which the tokenizer must have the tokens of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

_SUM = re.compile(r"\s*(\d{1,9})([+-])(\d{1,9})\s*")
_MOST_CALLS = 3
_TOOL_TURN = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"


def calculated(text: str) -> str | None:
    """What a sum comes to; None if the text is none."""
    found = _SUM.fullmatch(text)
    if found is None:
        return None
    left, sign, right = found.groups()
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


def rollout(row: Any, generate: Callable[[Sequence[int]], list[int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The turns after a prompt, and which tokens of them the student wrote; see `tutelage.trainer.rollout.tools`."""
    prompt = [int(token) for token in row.prompt_ids]
    ids, mask = list[int](), list[bool]()
    for _ in range(_MOST_CALLS + 1):
        written = generate([*prompt, *ids])
        ids, mask = ids + written, mask + [True] * len(written)
        ended = bool(written) and written[-1] == tokenizer.eos_token_id
        result = calculated(tokenizer.decode(written[:-1])) if ended else None
        if result is None:
            break
        answer = tokenizer.encode(_TOOL_TURN.format(result), add_special_tokens=False)
        ids, mask = ids + answer, mask + [False] * len(answer)
    return ids, mask
