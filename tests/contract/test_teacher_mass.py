"""Rows that keep as many ids as have a mass: what the server sends, the client checks, and the loss uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_teacher import HIDDEN_SIZE, VOCABULARY_SIZE, fake_head
from tutelage.config import validate
from tutelage.errors import ConfigurationError, CorruptFrame
from tutelage.rpc import codec
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Scoring, Signal
from tutelage.teacher_server.signals import frame_encoder as frames
from tutelage.trainer.config.student import ObjectiveConfig
from tutelage.trainer.data.sequences import TokenSequence, token_sequence
from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec
from tutelage.trainer.teacher.frame_decoder import Answer
from tutelage.trainer.teacher.rows import Unembedding
from tutelage.trainer.teacher.to_tensors import teacher_rows
from tutelage.trainer.training.objective import signal_spec

HEAD = fake_head()
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, 40).astype(np.int32)
STATES = torch.randn(40, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
K = 30
SPEC = SignalSpec("topk", K, (2.0, 1.0), min_mass=0.7)
REQUEST = TokenSequence(TOKENS, 0, 40)


def sent(spec: SignalSpec, frame_bytes: int = 2000) -> list[pb.SignalFrame]:
    signal = Signal(pb.SIGNAL_KIND_TOPK, spec.k, spec.temperatures, None, spec.min_mass, spec.temperatures[0])
    scoring = Scoring(TOKENS, signal, 0, 40)
    return [
        frames.frame(scoring, STATES[start:end], HEAD, index=index, start=start, end=end)
        for index, (start, end) in enumerate(frames.ranges(scoring, HEAD, frame_bytes, scoring.start, scoring.end))
    ]


def received(answered: list[pb.SignalFrame], spec: SignalSpec) -> SignalArrays:
    answer = Answer(REQUEST, spec, VOCABULARY_SIZE, HIDDEN_SIZE)
    for frame in answered:
        answer.add(frame)
    return answer.arrays()


@settings(max_examples=40, deadline=None)
@given(st.floats(2**-10, 1.0, width=32), st.integers(1, VOCABULARY_SIZE), st.sampled_from([0.5, 1.0, 4.0]))
def test_each_row_keeps_the_fewest_likeliest_ids_that_have_the_mass(min_mass, k, temperature):
    spec = SignalSpec("topk", k, (temperature,), min_mass)
    signals = received(sent(spec), spec)
    logits = HEAD.logits(STATES).double()
    order = logits.argsort(dim=1, descending=True, stable=True)
    probability = (logits / temperature).softmax(1)
    for row in range(len(TOKENS)):
        ids = signals["ids_RK"][row][signals["ids_RK"][row] >= 0]
        assert ids.tolist() == order[row, : len(ids)].tolist()
        mass = probability[row, order[row]].cumsum(0)
        # float32 sums may fall on the other side of the mass by their rounding.
        assert len(ids) == k or mass[len(ids) - 1] >= min_mass - 1e-5
        assert len(ids) == 1 or mass[len(ids) - 2] < min_mass + 1e-5
        padding = signals["ids_RK"][row] < 0
        assert np.isneginf(signals["logits_RK"][row][padding]).all()


def test_rows_cost_the_bytes_of_what_they_keep():
    everything, (part,) = sent(SignalSpec("topk", VOCABULARY_SIZE, (1.0,), 1.0), 10**6), sent(SPEC, 10**6)
    lengths = codec.decode(part.row_lengths)
    assert 1 <= lengths.min() < lengths.max() <= K
    assert len(part.ids.data) == 2 * lengths.sum()
    assert len(part.logits.data) == 4 * lengths.sum()
    assert part.ByteSize() < everything[0].ByteSize() / 2


def altered(change) -> list[pb.SignalFrame]:
    answered = sent(SPEC)
    change(answered[1])
    answered[1].checksum = codec.frame_checksum(answered[1])
    return answered


def lengths(array) -> pb.Tensor:
    return codec.encode(np.asarray(array, np.int32))


def set_lengths(change):
    def alter(frame):
        frame.row_lengths.CopyFrom(lengths(change(codec.decode(frame.row_lengths).copy())))

    return alter


def drop_an_id(frame):
    """A row that is one id short, in an otherwise consistent frame."""
    row_lengths = codec.decode(frame.row_lengths).copy()
    row = int(row_lengths.argmax())
    last = int(row_lengths[: row + 1].sum()) - 1
    for name in ("ids", "logits"):
        tensor = getattr(frame, name)
        tensor.CopyFrom(codec.encode(np.delete(codec.decode(tensor), last)))
    row_lengths[row] -= 1
    frame.row_lengths.CopyFrom(lengths(row_lengths))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (set_lengths(lambda array: array[:-1]), "row_lengths"),
        (set_lengths(lambda array: array * 0), "row_lengths"),
        (set_lengths(lambda array: array * 0 + K + 1), "row_lengths"),
        (set_lengths(lambda array: np.append(array[1:], array[0] + 1)), "ids"),
        (drop_an_id, "row_lengths"),
        (lambda frame: frame.ClearField("row_lengths"), "row_lengths"),
    ],
    ids=["fewer", "empty", "long", "do not add up", "too little mass", "missing"],
)
def test_ragged_rows_that_cannot_be_right_are_refused_by_name(change, field):
    with pytest.raises(CorruptFrame) as refusal:
        received(altered(change), SPEC)
    assert refusal.value.field == field


def test_changed_lengths_do_not_pass_the_checksum():
    answered = sent(SPEC)
    answered[1].row_lengths.data = b"\1" + answered[1].row_lengths.data[1:]
    with pytest.raises(CorruptFrame, match="damaged on its way"):
        received(answered, SPEC)


def test_the_loss_of_ragged_rows_is_that_of_each_row_alone():
    sequence = token_sequence(TOKENS[:1], TOKENS[1:], loss_on_prompt=True)
    signals = received(sent(SPEC), SPEC)
    generator = torch.Generator().manual_seed(3)
    student = Unembedding(torch.randn(VOCABULARY_SIZE, 8, generator=generator))
    hidden_ND = torch.randn(len(TOKENS) - 1, 8, generator=generator)

    def rows_of(part: slice, width: int | None):
        """Some rows, at their own width."""
        values = {name: array[:39][part] for name, array in signals.items()}
        for name in ("ids_RK", "logits_RK"):
            values[name] = values[name][:, :width]
        return teacher_rows([sequence], [values], None, torch.device("cpu"))

    def loss(teacher, hidden):
        settings = {"parameters": {}, "distribution": TeacherDistribution(temperature=2.0), "approximate": False}
        return token_divergence(hidden, student, teacher, objective="forward_kl", **settings)

    together = loss(rows_of(slice(None), None), hidden_ND)
    widths = (signals["ids_RK"] >= 0).sum(1)
    alone = [loss(rows_of(slice(row, row + 1), int(widths[row])), hidden_ND[row : row + 1]) for row in range(39)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_objectives_keep_by_mass_only_with_topk():
    objective = ObjectiveConfig(name="forward_kl", signal="topk", k=200, min_mass=0.95, temperature=2.0)
    assert signal_spec(objective) == SignalSpec("topk", 200, (2.0,), 0.95)
    with pytest.raises(ConfigurationError, match="not hidden"):
        validate(ObjectiveConfig, {"name": "forward_kl", "signal": "hidden", "min_mass": 0.5})
