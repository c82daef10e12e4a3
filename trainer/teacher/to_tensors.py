"""From the arrays of a teacher's answer to the rows that the objectives take.

Shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, UnembeddingArrays
from tutelage.trainer.teacher.frame_decoder import joined
from tutelage.trainer.teacher.rows import CandidateRows, HiddenRows, TeacherRows, TopKRows, Unembedding


def unembedding_of(arrays: UnembeddingArrays, device: torch.device, vocabulary_size: int | None = None) -> Unembedding:
    """The teacher's head as tensors; on the CPU they share the arrays' memory.

    Args:
        arrays: as they were sent.
        device: of the tensors.
        vocabulary_size: the student's; what the teacher has beyond it is set apart. None means the teacher's.

    """
    matrix_VD = torch.from_numpy(arrays.rows_VD)
    if arrays.rows_VD.dtype == np.uint16:
        matrix_VD = matrix_VD.view(torch.bfloat16)
    bias_V = None if arrays.bias_V is None else torch.from_numpy(arrays.bias_V).to(device)
    whole = Unembedding(matrix_VD.to(device), bias_V, arrays.scale, arrays.softcap)
    if vocabulary_size is None or vocabulary_size >= len(matrix_VD):
        return whole
    own, others = slice(vocabulary_size), slice(vocabulary_size, None)
    return replace(whole.at(own), beyond=whole.at(others))


def teacher_rows(
    sequences: Sequence[TokenSequence],
    answers: Sequence[SignalArrays],
    unembedding: Unembedding | None,
    device: torch.device,
) -> TeacherRows:
    """The rows of several sequences, one after the other, from what the teacher answered to each."""
    # Joining copies: the arrays are read-only bytes of the wire, which torch does not take.
    learned = [learned_rows(sequence, answer) for sequence, answer in zip(sequences, answers, strict=True)]
    tensors = {name: torch.from_numpy(array).to(device) for name, array in joined(learned).items()}
    digest_N, position_N = sequence_digests(sequences).to(device), positions(sequences).to(device)
    if "hidden_RD" in tensors:
        assert unembedding is not None
        hidden_ND = tensors["hidden_RD"]
        if hidden_ND.dtype == torch.uint16:
            hidden_ND = hidden_ND.view(torch.bfloat16)
        return HiddenRows(hidden_ND, digest_N, position_N, unembedding)
    logits_NK, logsumexp_N, target_logits_N = (
        tensors["logits_RK"],
        tensors["logsumexp_RM"][:, 0],
        tensors["target_logits"],
    )
    if "ids_RK" in tensors:
        return TopKRows(tensors["ids_RK"].long(), logits_NK, logsumexp_N, target_logits_N, digest_N, position_N)
    candidates = [
        sequence.candidate_ids_RC if sequence.mask is None else sequence.candidate_ids_RC[sequence.mask]
        for sequence in sequences
        if sequence.candidate_ids_RC is not None
    ]
    ids_NC = torch.from_numpy(np.concatenate(candidates)).to(device).long()
    return CandidateRows(ids_NC, logits_NK, logsumexp_N, target_logits_N, digest_N, position_N)


def learned_rows(sequence: TokenSequence, answer: SignalArrays) -> SignalArrays:
    """Of what a teacher answered, from `start` to `end`, the rows that are learned from."""
    if sequence.mask is None:
        return answer
    return {name: array[sequence.mask[: len(array)]] for name, array in answer.items()}


def targets_of(sequences: Sequence[TokenSequence]) -> Tensor:
    """The target of each row, int64 [N]; rows of last positions have none."""
    return torch.cat([torch.from_numpy(sequence.targets).long() for sequence in sequences])


def sampler_logps_of(sequences: Sequence[TokenSequence]) -> Tensor:
    """With what ln p a sampler drew the token after each row, float32 [N]; NaN where none drew it, or said so."""
    parts = []
    for sequence in sequences:
        logp_T = np.full(len(sequence.ids) + 1, np.nan, np.float32)
        if sequence.sampler_logp is not None:
            logp_T[sequence.prompt_tokens : -1] = sequence.sampler_logp
        parts.append(torch.from_numpy(logp_T[sequence.positions + 1]))
    return torch.cat(parts)


def drawn_tokens(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows after which a sampler drew a token and said how: their places, the tokens, both int64, and ln p."""
    logp_N = sampler_logps_of(sequences)
    following = [torch.from_numpy(np.append(sequence.ids, -1)[sequence.positions + 1]) for sequence in sequences]
    (rows,) = logp_N.isfinite().nonzero(as_tuple=True)
    return rows, torch.cat(following).long()[rows], logp_N[rows]


def sequence_digests(sequences: Sequence[TokenSequence]) -> Tensor:
    """For each row the digest of its sequence, int64 [N] in two's complement."""
    digests = np.array([sequence.digest for sequence in sequences], np.uint64)
    return torch.from_numpy(digests.view(np.int64)).repeat_interleave(row_counts(sequences))


def positions(sequences: Sequence[TokenSequence]) -> Tensor:
    """For each row its position, int64 [N]."""
    return torch.cat([torch.from_numpy(sequence.positions) for sequence in sequences])


def row_counts(sequences: Sequence[TokenSequence]) -> Tensor:
    """Rows of each sequence, int64 [B]."""
    return torch.tensor([sequence.rows for sequence in sequences])
