"""A sequence as it is trained on, for people: its text with what is scored in colour, or in brackets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from rich.text import Text

from tutelage.trainer.data.sequences import TokenSequence

_SCORED, _OTHER = "bold green", "dim"


def shown(sequence: TokenSequence, tokenizer: Any, *, colour: bool) -> Text:
    """The sequence's tokens as text; line ends stay line ends.

    Args:
        sequence: as a step takes it.
        tokenizer: the student's.
        colour: whether scored tokens are coloured; else they stand in ⟦ ⟧.

    """
    scored = np.zeros(len(sequence.ids) + 1, bool)
    scored[sequence.positions + 1] = True  # The row of a position is about the token that follows it.
    scored = scored[: len(sequence.ids)]
    edges = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1).tolist(), len(scored)]
    text = Text()
    for start, end in pairwise(edges):
        part = tokenizer.decode(sequence.ids[start:end])
        is_scored = bool(scored[start])
        text.append(f"⟦{part}⟧" if is_scored and not colour else part, _SCORED if is_scored else _OTHER)
    return text
