"""What an engine is: a checkpoint that generates and gives log-likelihoods, all in token ids.

What an engine returns for a sequence depends on that sequence, its seed and, through rounding, on what shares
its batch; the evaluator therefore cuts batches the same way every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How to generate.

    Attributes:
        temperature: 0 takes the likeliest token, T > 0 samples from softmax(logits / T).
        max_new_tokens: at most so many tokens, the end-of-sequence token included.

    """

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Generation:
    """What was generated after a prompt; `finish_reason` is "stop" or "length"."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ScoringGroup:
    """Continuations of one context, all as token ids, none empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Engine(Protocol):
    """A checkpoint that generates and gives log-likelihoods, as lm-evaluation-harness' `LM` does."""

    @property
    def name(self) -> str:
        """For the rows."""
        ...

    @property
    def dtype(self) -> str:
        """Arithmetic of the model, for the rows."""
        ...

    @property
    def max_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        ...

    @property
    def batch_size(self) -> int:
        """Items that are handed over together, and durable together."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, as transformers loads it."""
        ...

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Generation]:
        """One answer a prompt; `seeds` decide the samples, one a prompt."""
        ...

    def loglikelihood(self, groups: Sequence[ScoringGroup]) -> list[list[float]]:
        """Sum of log-probabilities (nats) of each continuation given its context, group by group."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...
