"""Frames: their sizes, their ranges, and that together they are the whole answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fake_teacher import HIDDEN_SIZE, VOCABULARY_SIZE, fake_head
from tutelage.rpc.codec import decode, frame_checksum, sequence_digest
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Scoring, Signal
from tutelage.teacher_server.signals import frame_encoder as frames

HEAD = fake_head()
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, 300).astype(np.int32)
STATES = torch.randn(300, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
TOPK = Signal(pb.SIGNAL_KIND_TOPK, 10, (1.0, 2.0), None)
HIDDEN = Signal(pb.SIGNAL_KIND_HIDDEN, 0, (), None)


def candidates(rows: int) -> Signal:
    ids = np.random.default_rng(1).integers(-1, VOCABULARY_SIZE, (rows, 6)).astype(np.int32)
    return Signal(pb.SIGNAL_KIND_CANDIDATES, 0, (1.0,), ids)


def all_frames(scoring: Scoring, frame_bytes: int) -> list[pb.SignalFrame]:
    return [
        frames.frame(scoring, STATES[start:end], HEAD, index=index, start=start, end=end)
        for index, (start, end) in enumerate(frames.ranges(scoring, HEAD, frame_bytes, scoring.start, scoring.end))
    ]


@pytest.mark.parametrize("signal", [TOPK, HIDDEN, candidates(250)], ids=["topk", "hidden", "candidates"])
@pytest.mark.parametrize("frame_bytes", [1, 1000, 10**6])
def test_frames_are_bounded_and_join_to_the_whole(signal, frame_bytes):
    scoring = Scoring(TOKENS, signal, start=50, end=300)
    (whole,) = all_frames(scoring, 10**7)
    cut = all_frames(scoring, frame_bytes)
    assert [frame.frame_index for frame in cut] == list(range(len(cut)))
    assert [frame.last for frame in cut] == [False] * (len(cut) - 1) + [True]
    assert all(frame.checksum == frame_checksum(frame) for frame in cut)
    assert all(frame.sequence_digest == sequence_digest(TOKENS) for frame in cut)
    position = 50
    for frame in cut:
        assert frame.position_start == position
        position += frame.position_count
    assert position == 300
    for name in ("ids", "logits", "target_logits", "logsumexp", "hidden"):
        if whole.HasField(name):
            joined = np.concatenate([decode(getattr(frame, name)) for frame in cut])
            np.testing.assert_allclose(joined, decode(getattr(whole, name)), rtol=1e-5, atol=1e-5)
    if frame_bytes == 1000:
        data = [
            sum(len(getattr(frame, name).data) for name in ("ids", "logits", "logsumexp", "hidden")) for frame in cut
        ]
        assert len(cut) > 5
        assert max(data) <= 1000


def test_target_tokens_follow_their_rows():
    logits = HEAD.logits(STATES)
    inner, outer = Scoring(TOKENS, TOPK, start=10, end=20), Scoring(TOKENS, TOPK, start=295, end=300)
    (frame,) = all_frames(inner, 10**6)
    expected = logits[range(10, 20), TOKENS[11:21]]
    np.testing.assert_allclose(decode(frame.target_logits), expected, rtol=1e-5, atol=1e-5)
    (frame,) = all_frames(outer, 10**6)
    assert decode(frame.logits).shape == (5, 10)
    np.testing.assert_allclose(decode(frame.target_logits), logits[range(295, 299), TOKENS[296:]], rtol=1e-5, atol=1e-5)


def test_a_sequence_of_one_token():
    scoring = Scoring(TOKENS[:1], TOPK, start=0, end=1)
    (frame,) = all_frames(scoring, 10**6)
    assert decode(frame.logits).shape == (1, 10)
    assert decode(frame.target_logits).shape == (0,)


def test_hidden_states_travel_bit_by_bit():
    (frame,) = all_frames(Scoring(TOKENS, HIDDEN, start=7, end=300), 10**6)
    assert frame.hidden.dtype == pb.DTYPE_BFLOAT16
    np.testing.assert_array_equal(decode(frame.hidden), STATES[7:].view(torch.uint16).numpy())


def test_ids_take_two_bytes_where_they_fit():
    (frame,) = all_frames(Scoring(TOKENS, TOPK, start=0, end=300), 10**6)
    assert frame.ids.dtype == pb.DTYPE_UINT16
