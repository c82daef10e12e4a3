"""A sequence to learn from: its token ids, and which of its positions the teacher scores and the loss sees.

Row of position t: the distribution over the token at t+1, the row's target. A sequence of n tokens whose prompt has p
is scored at p-1 … n-2, and from 0 if prompt tokens count. The last position, after which nothing was written, has a row
only if the configuration says so (`loss_on_last_token`), and no target. Where a conversation has several turns, a mask
says which of the rows between the first and the last one are learned from; the teacher is asked for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import DataError
from tutelage.rpc import codec

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Completion:
    """What a student wrote after a prompt."""

    ids: TokenIds
    """int32 [T], at least one."""
    logp: npt.NDArray[np.float32] | None = None
    """float32 [T], nats: ln of the probability with which the sampler drew each token; 0 where it drew none. None if it
    was not asked."""
    mask: Mask | None = None
    """bool [T]: which tokens the student wrote; the others are a tool's answers. None means all."""
    versions: npt.NDArray[np.int32] | None = None
    """int32 [T]: how many steps the weights had seen that wrote each token. None means as many as when it was begun."""


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
    """For the signal `candidates`: the ids whose logits are asked for at each position from `start` to `end`, padded
    with -1."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    weights_version: int | None = None
    """Optimizer steps done when the student wrote the completion; None if the data has it."""
    mask: Mask | None = None
    """bool [end - start]: which positions from `start` to `end` are learned from; None means all."""
    teacher: str | None = None
    """Name of the teacher that is asked about it; None means the run's one."""
    teacher_prompt_ids: TokenIds | None = None
    """What the teacher reads in place of the prompt, before the same completion; None means the prompt."""
    sampler_logp: npt.NDArray[np.float32] | None = None
    """float32 [completion]: as `Completion.logp`, but NaN where the student drew none."""

    @property
    def for_teacher(self) -> TokenSequence:
        """The sequence as the teacher reads it: the same completion, whose rows are in order those of the student."""
        told = self.teacher_prompt_ids
        if told is None:
            return self
        shift = len(told) - self.prompt_tokens
        return replace(
            self,
            ids=np.concatenate([told, self.ids[self.prompt_tokens :]]),
            start=self.start + shift,
            end=self.end + shift,
            prompt_tokens=len(told),
            teacher_prompt_ids=None,
        )

    @property
    def is_own(self) -> bool:
        """Whether the student wrote it."""
        return self.weights_version is not None

    @property
    def rows(self) -> int:
        """Positions that are learned from."""
        return self.end - self.start if self.mask is None else int(self.mask.sum())

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """The positions that are learned from, int64 [rows], ascending."""
        between = np.arange(self.start, self.end)
        return between if self.mask is None else between[self.mask]

    @property
    def completion_tokens(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_tokens

    @property
    def targets(self) -> TokenIds:
        """The token that follows each position that is learned from; the sequence's last position has none."""
        following = self.positions + 1
        return self.ids[following[following < len(self.ids)]]

    @property
    def digest(self) -> int:
        """As the teacher announces with each frame which sequence it is about: 0 … 2⁶⁴-1."""
        return codec.sequence_digest(self.ids)


def answered(example: TokenizedExample, *, loss_on_prompt: bool) -> TokenSequence:
    """The sequence of a row and the answer that the data has; see `token_sequence`."""
    return token_sequence(
        example.prompt_ids,
        example.completion_ids,
        loss_on_prompt=loss_on_prompt,
        mask=example.mask,
        teacher=example.teacher,
        teacher_prompt_ids=example.teacher_prompt_ids,
    )


def token_sequence(
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
    *,
    loss_on_prompt: bool,
    loss_on_last_token: bool = False,
    mask: Mask | None = None,
    weights_version: int | None = None,
    teacher: str | None = None,
    teacher_prompt_ids: TokenIds | None = None,
) -> TokenSequence:
    """The sequence of a prompt and its completion, neither empty, scored where the loss sees it.

    Args:
        prompt_ids: what the completion follows.
        completion_ids: of the data, or of the student.
        loss_on_prompt: whether all tokens are learned from, whatever the mask says.
        loss_on_last_token: whether the position after the last token has a row as well.
        mask: bool [prompt + completion], which tokens are learned from, at least one; None means the completion's.
        weights_version: as in `TokenSequence`.
        teacher: as in `TokenSequence`.
        teacher_prompt_ids: as in `TokenSequence`.

    Raises:
        DataError: tokens of the prompt are learned from, but the teacher reads another prompt.

    """
    ids = np.concatenate([prompt_ids, completion_ids])
    tokens = np.ones(len(ids), bool)
    if not loss_on_prompt:
        tokens = np.arange(len(ids)) >= len(prompt_ids) if mask is None else mask.copy()
    # The row of a token is that of the position before it, which the first token has not.
    rows = np.append(tokens[1:], loss_on_last_token)
    start, last = np.flatnonzero(rows)[[0, -1]].tolist()
    shared = prompt_ids[start + 1 :]  # Answers before the last one, if they are learned from.
    if teacher_prompt_ids is not None and not (
        len(shared) < len(teacher_prompt_ids)
        and np.array_equal(teacher_prompt_ids[len(teacher_prompt_ids) - len(shared) :], shared)
    ):
        raise DataError(
            "tokens of the prompt are learned from, but the teacher has a prompt of its own and says nothing about "
            "them; set loss_on_prompt: false",
            "loss_on_prompt",
        )
    between = rows[start : last + 1]
    return TokenSequence(
        ids,
        start=start,
        end=last + 1,
        mask=None if between.all() else between,
        prompt_tokens=len(prompt_ids),
        weights_version=weights_version,
        teacher=teacher,
        teacher_prompt_ids=teacher_prompt_ids,
    )
