"""Checks every frame of a teacher's answer and puts the rows of one request together.

Nothing of an answer is used before all of it has been checked: order, positions, checksum, which
sequence it is about, dtypes, shapes, and that the numbers can be a distribution's.

Shapes: the legend in docs/architecture.md; R scored positions of a sequence or frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.errors import CorruptFrame
from tutelage.rpc import codec
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec

Array = npt.NDArray[Any]

_KINDS = {
    "topk": pb.SIGNAL_KIND_TOPK,
    "candidates": pb.SIGNAL_KIND_CANDIDATES,
    "hidden": pb.SIGNAL_KIND_HIDDEN,
}
# All ones in a bfloat16's eight exponent bits mean infinity or NaN; numpy has no bfloat16 to ask.
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_PADDING = {"ids_RK": -1, "logits_RK": -np.inf}
# The teacher sums 10⁵ float32 terms in another order than we check them in.
_LOGSUMEXP_SLACK = 1e-3


def to_message(request_id: str, sequence: TokenSequence, spec: SignalSpec) -> pb.ScoreSequencesRequest:
    """The request as the contract writes it."""
    signal = pb.SignalSpec(kind=_KINDS[spec.kind], k=spec.k, temperatures=spec.temperatures)
    if spec.min_mass > 0:
        signal.min_mass, signal.mass_temperature = spec.min_mass, spec.temperatures[0]
    if sequence.candidate_ids_RC is not None:
        signal.candidate_ids.CopyFrom(codec.encode(sequence.candidate_ids_RC))
    return pb.ScoreSequencesRequest(
        request_id=request_id,
        token_ids=codec.encode(sequence.ids),
        signal=signal,
        score_start=sequence.start,
        score_end=sequence.end,
    )


@dataclass
class Answer:
    """Collects the frames of one request."""

    sequence: TokenSequence
    spec: SignalSpec
    vocabulary_size: int
    hidden_size: int
    _parts: list[SignalArrays] = field(default_factory=list)
    _next_position: int = field(init=False)
    complete: bool = False
    """Whether the last frame was added."""

    def __post_init__(self) -> None:
        self._next_position = self.sequence.start
        self._digest = self.sequence.digest

    def add(self, frame: pb.SignalFrame) -> None:
        """Checks and keeps one frame.

        Raises:
            CorruptFrame: it is not the next frame of this answer, or its content is damaged.

        """
        self._check_place(frame)
        self._parts.append(self._check_content(frame))
        self._next_position += frame.position_count
        self.complete = frame.last

    def arrays(self) -> SignalArrays:
        """All rows; call it when `complete`."""
        assert self.complete
        return joined(self._parts)

    def _check_place(self, frame: pb.SignalFrame) -> None:
        end = self._next_position + frame.position_count
        _require(not self.complete, "frame_index", "a frame follows the last one")
        _require(
            frame.frame_index == len(self._parts),
            "frame_index",
            f"frame {frame.frame_index} came where {len(self._parts)} was due",
        )
        _require(
            frame.sequence_digest == self._digest, "sequence_digest", "the frame is about another sequence than asked"
        )
        _require(frame.kind == _KINDS[self.spec.kind], "kind", f"kind {frame.kind} was not asked for")
        _require(
            frame.position_start == self._next_position and frame.position_count > 0,
            "position_start",
            f"{frame.position_count} rows from {frame.position_start} came where {self._next_position} was due",
        )
        _require(
            end <= self.sequence.end and frame.last == (end == self.sequence.end),
            "last",
            f"rows up to {end} of {self.sequence.end} came with last={frame.last}",
        )
        _require(frame.checksum == codec.frame_checksum(frame), "checksum", "the frame was damaged on its way")

    def _check_content(self, frame: pb.SignalFrame) -> SignalArrays:
        rows = frame.position_count
        if self.spec.kind == "hidden":
            hidden_RD = _array(frame, "hidden", (rows, self.hidden_size), np.uint16)
            _require(frame.hidden.dtype == pb.DTYPE_BFLOAT16, "hidden", "is not bfloat16")
            finite = (hidden_RD & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT
            _require(bool(finite.all()), "hidden", "a number is not finite")
            return {"hidden_RD": hidden_RD}
        logsumexp_RM = _array(frame, "logsumexp", (rows, len(self.spec.temperatures)), np.float32)
        # After the sequence's last token nothing follows whose logit there would be.
        has_last = frame.position_start + rows == len(self.sequence.ids)
        target_logits = _array(frame, "target_logits", (rows - has_last,), np.float32)
        _require_finite(target_logits, "target_logits")
        _require_finite(logsumexp_RM, "logsumexp")
        both = {"target_logits": target_logits, "logsumexp_RM": logsumexp_RM}
        if self.spec.kind == "topk":
            ids_RK, logits_RK = self._topk(frame)
            _check_topk(ids_RK, logits_RK, logsumexp_RM, self.spec)
            return {"ids_RK": ids_RK, "logits_RK": logits_RK, **both}
        assert self.sequence.candidate_ids_RC is not None
        start = frame.position_start - self.sequence.start
        absent_RC = self.sequence.candidate_ids_RC[start : start + rows] == -1
        logits_RC = _array(frame, "logits", (rows, absent_RC.shape[1]), np.float32)
        _require(bool(np.isneginf(logits_RC[absent_RC]).all()), "logits", "an absent candidate has a logit")
        _require_finite(logits_RC[~absent_RC], "logits")
        return {"logits_RK": logits_RC, **both}

    def _topk(self, frame: pb.SignalFrame) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids and logits; ragged rows are padded to the longest."""
        rows, ragged = frame.position_count, self.spec.min_mass > 0
        lengths_R = _lengths(frame, self.spec.k) if ragged else np.full(rows, self.spec.k)
        shape = (int(lengths_R.sum()),) if ragged else (rows, self.spec.k)
        # Vocabularies of up to 65,536 ids travel as uint16.
        ids = _array(frame, "ids", shape, np.uint16, np.int32).astype(np.int32)
        logits = _array(frame, "logits", shape, np.float32)
        _require(bool((ids >= 0).all() and (ids < self.vocabulary_size).all()), "ids", "ids out of range")
        _require_finite(logits, "logits")
        if not ragged:
            return ids, logits
        kept_RK = np.arange(lengths_R.max()) < lengths_R[:, None]
        ids_RK, logits_RK = np.full(kept_RK.shape, -1, np.int32), np.full(kept_RK.shape, -np.inf, np.float32)
        ids_RK[kept_RK], logits_RK[kept_RK] = ids, logits
        return ids_RK, logits_RK


def _require(condition: bool, field_name: str, problem: str) -> None:
    if not condition:
        raise CorruptFrame(f"{problem}; the answer is not used", field_name)


def _require_finite(array: Array, field_name: str) -> None:
    _require(bool(np.isfinite(array).all()), field_name, "a number is not finite")


def _array(frame: pb.SignalFrame, name: str, shape: Sequence[int], *dtypes: type[np.generic]) -> Array:
    array = codec.decode(getattr(frame, name), name)
    _require(array.dtype in [np.dtype(dtype) for dtype in dtypes], name, f"has dtype {array.dtype}")
    _require(array.shape == tuple(shape), name, f"has shape {array.shape}, expected {tuple(shape)}")
    return array


def _lengths(frame: pb.SignalFrame, k: int) -> Array:
    lengths_R = _array(frame, "row_lengths", (frame.position_count,), np.int32)
    _require(bool((lengths_R >= 1).all() and (lengths_R <= k).all()), "row_lengths", f"a row has not 1 to {k} ids")
    return lengths_R


def _check_topk(ids_RK: Array, logits_RK: Array, logsumexp_RM: Array, spec: SignalSpec) -> None:
    # Twice in a row, an id's mass would count twice, and the tail would be too small by it.
    ascending = np.sort(ids_RK, axis=1)
    twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    _require(not twice.any(), "ids", "an id occurs twice in a row")
    _require(bool((logits_RK[:, 1:] <= logits_RK[:, :-1]).all()), "logits", "a row is not sorted by falling logit")
    largest_R = logits_RK[:, 0]
    # Relative to the largest logit: exp of raw logits overflows float32 above 88.
    for column, temperature in enumerate(spec.temperatures):
        mass_R = np.exp((logits_RK - largest_R[:, None]) / np.float32(temperature)).sum(axis=1)
        mass_logp = np.log(mass_R) + largest_R / temperature - logsumexp_RM[:, column]
        _require(bool((mass_logp <= _LOGSUMEXP_SLACK).all()), "logsumexp", "the kept ids have more mass than there is")
        # The teacher counts mass at the first temperature alone, so that one frame has one length of each row.
        if column == 0 and spec.min_mass > 0:
            enough_R = mass_logp >= np.log(spec.min_mass) - _LOGSUMEXP_SLACK
            full_R = (ids_RK >= 0).sum(axis=1) == spec.k
            _require(bool((enough_R | full_R).all()), "row_lengths", "a row keeps less mass than was asked for")


def joined(parts: Sequence[SignalArrays]) -> SignalArrays:
    """Rows one after the other; where their widths differ, the shorter ones are padded as `SignalArrays` says."""
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    for name in _PADDING.keys() & columns.keys():
        width = max(array.shape[1] for array in columns[name])
        columns[name] = [
            np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=_PADDING[name])
            for array in columns[name]
        ]
    return {name: np.concatenate(arrays) for name, arrays in columns.items()}
