"""What every teacher is to a student: someone who scores sequences, whose head is known, and who stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tutelage.trainer.data.sequences import TokenSequence

SignalArrays: TypeAlias = dict[str, npt.NDArray[Any]]
"""The checked rows of one sequence (R positions from its `start` to its `end`), with the arrays of its kind of signal:

- `topk`: `ids_RK` int32, short rows padded with -1; `logits_RK` float32, -inf where an id is -1.
- `candidates`: `logits_RK` float32, -inf where the asked id is -1.
- `topk` and `candidates`: `logsumexp_RM` float32, one column for each temperature; `target_logits` float32, one for
  each row but that of the sequence's last position.
- `hidden`: `hidden_RD` uint16, bfloat16 bit patterns; float32 of a teacher in the student's process.
"""


@dataclass(frozen=True)
class SignalSpec:
    """Which signal is asked for."""

    kind: str
    """`topk`, `candidates` or `hidden`."""
    k: int = 0
    """`topk` only."""
    temperatures: tuple[float, ...] = ()
    """`topk` and `candidates`."""
    min_mass: float = 0.0
    """`topk`: if above 0, rows keep as many ids as have this mass at the first temperature, k at most."""


@dataclass(frozen=True)
class UnembeddingArrays:
    """The matrix that turns hidden states into logits, as it was sent."""

    rows_VD: npt.NDArray[Any]
    """float32, or bfloat16 as uint16 bit patterns."""
    bias_V: npt.NDArray[np.float32] | None
    scale: float
    softcap: float


@dataclass(frozen=True)
class TeacherIdentity:
    """Who the teacher of this run is."""

    model_name: str
    weights_digest: str
    vocabulary_size: int
    hidden_size: int
    noise_floor_kl: float
    """Mean KL between two scorings of the same tokens, nats per token."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a text for the teacher; a student that learns from it learns to end with them."""
    block_tokens: int = 0
    """Tokens of a block of its prefix cache, of which it reuses whole ones; 0 if it computes every sequence anew."""


class Teacher(Protocol):
    """What the training loop needs of a teacher."""

    identity: TeacherIdentity

    @property
    def waited_seconds(self) -> float:
        """Time spent waiting for a teacher that was away or full, in all."""

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """What the teacher says about the positions from `start` to `end` of each sequence, in order."""

    def unembedding(self) -> UnembeddingArrays:
        """The matrix that turns `hidden` into logits."""
