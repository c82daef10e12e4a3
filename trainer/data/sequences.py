"""A sequence to learn from: its token ids, and which of its positions the teacher scores and the loss sees.

Row of position t: the distribution over the token at t+1, the row's target. A sequence of n tokens whose prompt has p
is scored at p-1 … n-2, and from 0 if prompt tokens count. The last position, after which nothing was written, has a row
only if the configuration says so (`loss_on_last_token`), and no target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tutelage.rpc import codec

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenSequence:
    """A sequence and which of its positions are scored."""

    ids: TokenIds
    """int32 [T], prompt and completion."""
    start: int
    """First scored position."""
    end: int
    """One past the last scored position."""
    candidate_ids_RC: npt.NDArray[np.int32] | None = None
    """For the signal `candidates`: the ids whose logits are asked for at each scored position, padded with -1."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    weights_version: int | None = None
    """Optimizer steps done when the student wrote the completion; None if the data has it."""

    @property
    def rows(self) -> int:
        """Scored positions."""
        return self.end - self.start

    @property
    def completion_tokens(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_tokens

    @property
    def targets(self) -> TokenIds:
        """The token that follows each scored position; the last position of the sequence has none."""
        return self.ids[self.start + 1 : self.end + 1]

    @property
    def digest(self) -> int:
        """As the teacher announces with each frame which sequence it is about: 0 … 2⁶⁴-1."""
        return codec.sequence_digest(self.ids)


def token_sequence(
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
    *,
    loss_on_prompt: bool,
    loss_on_last_token: bool = False,
    weights_version: int | None = None,
) -> TokenSequence:
    """The sequence of a prompt and its completion, neither empty, scored where the loss sees it."""
    ids = np.concatenate([prompt_ids, completion_ids])
    return TokenSequence(
        ids,
        start=0 if loss_on_prompt else len(prompt_ids) - 1,
        end=len(ids) if loss_on_last_token else len(ids) - 1,
        prompt_tokens=len(prompt_ids),
        weights_version=weights_version,
    )
