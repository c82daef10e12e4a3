"""What the service asks of an engine: hidden states of given tokens, and newly generated tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CompletionDelta:
    """Tokens since the previous piece of the same continuation."""

    sample_index: int
    """Which continuation, 0 … samples-1."""

    token_ids: Sequence[int]
    """The new tokens."""

    text: str
    """Their text."""

    finish_reason: str
    """Empty while it is generated, then "stop" or "length"."""


@dataclass(frozen=True)
class Sampling:
    """How a continuation is generated; ranges as in `WriteRationalesRequest`, with its defaults filled in."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


class Engine(Protocol):
    """Common to both kinds."""

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone; it does not come back."""

    def shutdown(self) -> None:
        """Ends the engine's processes."""


class ScoringEngine(Engine, Protocol):
    """Runs a teacher over given tokens."""

    async def hidden_states(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Final hidden state after each token: [len(token_ids), hidden_size], on the CPU.

        Cancelling frees the engine's slot.

        Raises:
            Unreachable: the engine is dead.

        """


class GenerationEngine(Engine, Protocol):
    """Continues prompts."""

    def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[CompletionDelta]:
        """Pieces of the continuations as they are generated; closing the iterator frees the engine's slots.

        Raises:
            Unreachable: the engine is dead.

        """
