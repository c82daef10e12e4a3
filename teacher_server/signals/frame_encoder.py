"""Cuts a sequence's rows into frames of bounded bytes, and computes and encodes each frame's signals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from tutelage.rpc.codec import encode, frame_checksum, sequence_digest
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Scoring, Signal
from tutelage.teacher_server.signals.logit_head import SignalHead, Signals, row_lengths

# Ids take two bytes where they can: 392 bytes a token of `topk` with k = 64, against 520 (docs/teacher.md).
_LARGEST_UINT16_VOCABULARY = 2**16


def row_bytes(scoring: Scoring, head: SignalHead) -> int:
    """Bytes of one row on the wire, at most, without the frame's header."""
    signal = scoring.signal
    if signal.kind == pb.SIGNAL_KIND_HIDDEN:
        return 2 * head.hidden_size
    others = 4 * (1 + len(signal.temperatures))
    if signal.candidate_ids_RC is not None:
        return 4 * int(signal.candidate_ids_RC.shape[1]) + others
    ragged = 4 if signal.min_mass > 0 else 0
    return (4 + int(_id_dtype(head).itemsize)) * signal.k + others + ragged


def ranges(
    scoring: Scoring, head: SignalHead, frame_bytes: int, piece_start: int, piece_end: int
) -> Iterator[tuple[int, int]]:
    """Position ranges [start, end) of the frames of a piece, in order."""
    rows = max(1, frame_bytes // row_bytes(scoring, head))
    for start in range(piece_start, piece_end, rows):
        yield start, min(start + rows, piece_end)


def frame(
    scoring: Scoring, hidden_RD: torch.Tensor, head: SignalHead, *, index: int, start: int, end: int
) -> pb.SignalFrame:
    """The frame of positions [start, end).

    Args:
        scoring: the request.
        hidden_RD: hidden states of those positions.
        head: the teacher's.
        index: which frame of the request this is.
        start: position of the first row.
        end: one past the position of the last row.

    """
    message = pb.SignalFrame(
        frame_index=index,
        position_start=start,
        position_count=end - start,
        last=end == scoring.end,
        sequence_digest=sequence_digest(scoring.token_ids),
        kind=scoring.signal.kind,
    )
    if scoring.signal.kind == pb.SIGNAL_KIND_HIDDEN:
        bits_RD = hidden_RD.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        message.hidden.CopyFrom(encode(bits_RD, bfloat16=True))
    else:
        _fill(message, _signals(scoring, hidden_RD, head, start, end), scoring.signal, _id_dtype(head))
    message.checksum = frame_checksum(message)
    return message


def _signals(scoring: Scoring, hidden_RD: torch.Tensor, head: SignalHead, start: int, end: int) -> Signals:
    # One fewer than rows at the end of a sequence, whose last position has no target.
    signal, target_ids = scoring.signal, scoring.token_ids[start + 1 : end + 1].tolist()
    if signal.candidate_ids_RC is None:
        return head.topk(hidden_RD, target_ids, k=signal.k, temperatures=signal.temperatures)
    rows = signal.candidate_ids_RC[start - scoring.start : end - scoring.start].astype(np.int64)
    return head.candidates(
        hidden_RD, target_ids, candidate_ids_RC=torch.from_numpy(rows), temperatures=signal.temperatures
    )


def _fill(message: pb.SignalFrame, signals: Signals, signal: Signal, id_dtype: np.dtype[np.uint16 | np.int32]) -> None:
    ids = None if signals.ids_RK is None else signals.ids_RK.numpy().astype(id_dtype)
    logits = signals.logits_RK.numpy()
    if ids is not None and signal.min_mass > 0:
        temperature = signal.mass_temperature
        logsumexp_R = signals.logsumexp_RM[:, signal.temperatures.index(temperature)]
        lengths = row_lengths(signals.logits_RK, logsumexp_R, temperature=temperature, min_mass=signal.min_mass)
        lengths_R: npt.NDArray[np.int32] = lengths.numpy()
        kept_RK = np.arange(signal.k) < lengths_R[:, None]  # by falling logit, so what is kept is a row's beginning
        ids, logits = ids[kept_RK], logits[kept_RK]
        message.row_lengths.CopyFrom(encode(lengths_R))
    if ids is not None:
        message.ids.CopyFrom(encode(ids))
    message.logits.CopyFrom(encode(logits))
    message.target_logits.CopyFrom(encode(signals.target_logits_R.numpy()))
    message.logsumexp.CopyFrom(encode(signals.logsumexp_RM.numpy()))


def _id_dtype(head: SignalHead) -> np.dtype[np.uint16 | np.int32]:
    return np.dtype(np.uint16 if head.vocabulary_size <= _LARGEST_UINT16_VOCABULARY else np.int32)
