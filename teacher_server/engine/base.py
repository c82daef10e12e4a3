"""What the service asks of an engine: hidden states of given tokens, and newly generated tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from prometheus_client.core import Metric


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


@dataclass(frozen=True)
class ComputedStates:
    """What a pass of the scoring engine computed: the states after tokens `start` … n-1 of a sequence of n."""

    states_RD: torch.Tensor
    """On the CPU; row 0 is the state after token `start`."""
    start: int
    """Tokens before it were read from the engine's cache, or are 0."""
    computed_tokens: int
    """Tokens that the engine ran the model over for it."""


class Engine(Protocol):
    """Common to both kinds."""

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone; it does not come back."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence that it takes."""

    def metrics(self) -> Iterable[Metric]:
        """What the engine counts by itself, for Prometheus; nothing unless the teacher has a port for it."""

    def shutdown(self) -> None:
        """Ends the engine's processes."""


class ScoringEngine(Engine, Protocol):
    """Runs a teacher over given tokens."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the prefix cache, of which whole ones are reused; 0 if the engine reuses none."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that the key-value cache holds."""

    @property
    def batch_tokens(self) -> int:
        """Tokens that the engine computes at once, at most."""

    async def hidden_states(self, token_ids: Sequence[int], first: int = 0, salt: str = "") -> ComputedStates:
        """Final hidden states after the tokens from `first` on at least.

        Args:
            token_ids: the sequence.
            first: 0 … len(token_ids); the states before it are not wanted, so that the engine may read what it has
                cached of them. No state comes back that was not computed.
            salt: keeps apart what the engine caches: only what was computed with the same salt is read.

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
