"""Between sequences, what is asked about them, and the rows that the objectives take.

Row of position t: the distribution over the token at t+1. A sequence of n tokens whose prompt has p is
scored at p-1 … n-2, and from 0 if prompt tokens count: every row has a target token. The last position, after
which nothing was written, has a part only if the configuration says so (`loss_on_last_token`).

Shape suffixes: N rows, K kept ids, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.rpc import codec
from tutelage.trainer.config.objective import ObjectiveConfig
from tutelage.trainer.losses.teacher_distribution import Smoothing
from tutelage.trainer.teacher.frame_decoder import SignalRequest, Signals, SignalSpec, joined
from tutelage.trainer.teacher.grpc_client import UnembeddingArrays
from tutelage.trainer.teacher.signals import CandidateRows, HiddenRows, TeacherRows, TopKRows, Unembedding

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Scored:
    """A sequence and which of its positions count."""

    ids: TokenIds
    """[n], prompt and completion."""
    prompt_tokens: int
    """Tokens of the prompt."""
    start: int
    """First scored position."""
    end: int
    """One past the last scored position."""
    weights_version: int | None = None
    """Of the student that wrote the completion; None if the data did."""

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
        """The target token of each row; the last position has none."""
        return self.ids[self.start + 1 : self.end + 1]

    def request(self, candidate_ids_RK: npt.NDArray[np.int32] | None = None) -> SignalRequest:
        """What to ask the teacher; `candidates` needs the student's ids [rows, C]."""
        return SignalRequest(self.ids, self.start, self.end, candidate_ids_RK)


def scored(
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
    *,
    loss_on_prompt: bool,
    loss_on_last_token: bool = False,
    weights_version: int | None = None,
) -> Scored:
    """The sequence of a prompt and its completion, neither empty."""
    ids = np.concatenate([prompt_ids, completion_ids])
    start = 0 if loss_on_prompt else len(prompt_ids) - 1
    return Scored(ids, len(prompt_ids), start, len(ids) if loss_on_last_token else len(ids) - 1, weights_version)


def signal_spec(objective: ObjectiveConfig) -> SignalSpec:
    """What the objective asks of the teacher; it must need one."""
    assert objective.signal is not None
    if objective.signal == "hidden":
        return SignalSpec("hidden")
    if objective.signal == "candidates":
        return SignalSpec("candidates", temperatures=(objective.temperature,))
    return SignalSpec("topk", objective.k, (objective.temperature,), objective.min_mass)


def smoothing_of(objective: ObjectiveConfig, noise_seed: int) -> Smoothing:
    """The objective's smoothing."""
    return Smoothing(
        temperature=objective.temperature,
        student_temperature=objective.student_temperature,
        noise=objective.noise,
        noise_seed=noise_seed,
        scale_by_temperature_squared=objective.scale_by_temperature_squared,
        top_k=objective.teacher_top_k,
        top_p=objective.teacher_top_p,
    )


def unembedding_of(arrays: UnembeddingArrays, device: torch.device) -> Unembedding:
    """The teacher's head as tensors; on the CPU they share the arrays' memory."""
    matrix_VD = torch.from_numpy(arrays.rows_VD)
    if arrays.rows_VD.dtype == np.uint16:
        matrix_VD = matrix_VD.view(torch.bfloat16)
    bias_V = None if arrays.bias_V is None else torch.from_numpy(arrays.bias_V).to(device)
    return Unembedding(matrix_VD.to(device), bias_V, arrays.scale, arrays.softcap)


def teacher_rows(
    sequences: Sequence[Scored],
    requests: Sequence[SignalRequest],
    signals: Sequence[Signals],
    unembedding: Unembedding | None,
    device: torch.device,
) -> TeacherRows:
    """The rows of several sequences, one after the other, from what was asked and answered."""

    def tensor(name: str) -> Tensor:
        # Joining copies: the arrays are read-only bytes of the wire, which torch does not take.
        return torch.from_numpy(joined([getattr(signal, name) for signal in signals], name)).to(device)

    digest_N, position_N = sequence_digests(sequences).to(device), positions(sequences).to(device)
    if signals[0].hidden_RD is not None:
        assert unembedding is not None
        hidden_ND = tensor("hidden_RD").view(torch.bfloat16)
        return HiddenRows(hidden_ND, digest_N, position_N, unembedding)
    logits_NK, target_logits_N = tensor("logits_RK"), tensor("target_logits")
    logsumexp_N = tensor("logsumexp_RM")[:, 0]
    if signals[0].ids_RK is not None:
        return TopKRows(tensor("ids_RK").long(), logits_NK, logsumexp_N, target_logits_N, digest_N, position_N)
    candidates = [request.candidate_ids_RK for request in requests if request.candidate_ids_RK is not None]
    ids_NC = torch.from_numpy(np.concatenate(candidates)).to(device).long()
    return CandidateRows(ids_NC, logits_NK, logsumexp_N, target_logits_N, digest_N, position_N)


def targets_of(sequences: Sequence[Scored]) -> Tensor:
    """The target token of each row, int64 [N]; rows of last positions have none."""
    return torch.cat([torch.from_numpy(sequence.targets).long() for sequence in sequences])


def sequence_digests(sequences: Sequence[Scored]) -> Tensor:
    """For each row the digest of its sequence, int64 [N] in two's complement."""
    digests = np.array([codec.sequence_digest(sequence.ids) for sequence in sequences], np.uint64)
    return torch.from_numpy(digests.view(np.int64)).repeat_interleave(row_counts(sequences))


def positions(sequences: Sequence[Scored]) -> Tensor:
    """For each row its position, int64 [N]."""
    return torch.cat([torch.arange(sequence.start, sequence.end) for sequence in sequences])


def row_counts(sequences: Sequence[Scored]) -> Tensor:
    """Rows of each sequence, int64 [B]."""
    return torch.tensor([sequence.rows for sequence in sequences])
