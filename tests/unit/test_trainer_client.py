"""The teacher's client against a gRPC server that answers right, wrong, late or not at all."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import CorruptFrame, IdentityMismatch, InvalidRequest, NotServed, Unreachable
from tutelage.identity import tokenizer_digests
from tutelage.rpc import codec
from tutelage.rpc.transport import INSTANCE_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.training.control import Control, Stopped

HIDDEN = SignalSpec("hidden")
TOPK = SignalSpec("topk", k=6, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def in_process(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture
def servicer(in_process: InProcessTeacher, tiny_model: Path) -> FaultyServicer:
    return FaultyServicer(in_process, tiny_model)


@pytest.fixture
def client(servicer: FaultyServicer, tiny_model: Path):
    with serving(servicer) as address, connect(address, tiny_model) as client:
        yield client


def connect(address: str, tiny_model: Path, **changes) -> TeacherClient:
    values = {"student_id": "ann", "wait_seconds": 5.0, "tokenizer_digests": tokenizer_digests(tiny_model)}
    return TeacherClient(address, **(values | changes))


def requests(count: int = 5) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 500, 6 + index).astype(np.int32) for index in range(count)]
    return [TokenSequence(item, 1 + index % 2, len(item) - index % 2) for index, item in enumerate(ids)]


def assert_same(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize("spec", [HIDDEN, TOPK], ids=["hidden", "topk"])
def test_many_requests_come_back_as_they_were_computed(client, in_process, spec):
    assert_same(client.score(requests(), spec), in_process.score(requests(), spec))


def test_candidates_come_back_with_their_padding(client, in_process):
    ids = np.arange(8, dtype=np.int32)
    candidates = np.array([[1, 2, -1], [4, 5, 6], [7, -1, -1]], np.int32)
    asked = [TokenSequence(ids, 2, 5, candidates)]
    spec = SignalSpec("candidates", temperatures=(1.0,))
    answer = client.score(asked, spec)
    assert_same(answer, in_process.score(asked, spec))
    assert np.isneginf(answer[0]["logits_RK"][candidates == -1]).all()


def test_the_unembedding_is_the_teachers(client, in_process):
    assert np.array_equal(client.unembedding().rows_VD, in_process.unembedding().rows_VD)
    assert client.unembedding() is client.unembedding()


def resealed(change):
    """A mischief that changes the second frame of each answer and gives it a fitting checksum."""

    def mischief(responses):
        frame = responses[1].frame
        change(frame)
        frame.checksum = codec.frame_checksum(frame)
        return responses

    return mischief


def flip_a_bit(responses):
    field = "hidden" if responses[1].frame.HasField("hidden") else "logits"
    tensor = getattr(responses[1].frame, field)
    tensor.data = bytes([tensor.data[0] ^ 1]) + tensor.data[1:]
    return responses


def for_another_request(responses):
    responses[1].request_id = "unknown"
    return responses


def set_number(field: str, index: int, value: float):
    def change(frame):
        tensor = getattr(frame, field)
        array = codec.decode(tensor).copy()
        array.flat[index] = value
        tensor.CopyFrom(codec.encode(array))

    return change


def not_a_number(frame):
    hidden = codec.decode(frame.hidden).copy()
    hidden.flat[3] = 0x7FC0
    frame.hidden.CopyFrom(codec.encode(hidden, bfloat16=True))


def repeat_an_id(frame):
    ids = codec.decode(frame.ids).copy()
    ids[0, 1] = ids[0, 0]
    frame.ids.CopyFrom(codec.encode(ids))


def swap_two(frame):
    logits = codec.decode(frame.logits).copy()
    logits[0, :2] = logits[0, 1::-1]
    frame.logits.CopyFrom(codec.encode(logits))


def lose_a_row(frame):
    frame.hidden.CopyFrom(codec.encode(codec.decode(frame.hidden)[1:], bfloat16=True))


def set_field(name: str, value):
    return lambda frame: setattr(frame, name, value)


HIDDEN_MISCHIEF = {
    "a dropped frame": (lambda responses: responses[:1] + responses[2:], "came where 1 was due"),
    "a repeated frame": (lambda responses: [*responses[:2], *responses[1:]], "came where 2 was due"),
    "frames out of order": (lambda responses: [responses[1], responses[0], *responses[2:]], "came where 0 was due"),
    "a missing end": (lambda responses: responses[:-1], "unanswered"),
    "a flipped bit": (flip_a_bit, "damaged on its way"),
    "an answer to nobody": (for_another_request, "not asked"),
    "another sequence": (resealed(set_field("sequence_digest", 7)), "another sequence"),
    "another kind": (resealed(set_field("kind", pb.SIGNAL_KIND_TOPK)), "not asked for"),
    "shifted positions": (resealed(set_field("position_start", 0)), "was due"),
    "an early end": (resealed(set_field("last", True)), "last=True"),
    "a number that is none": (resealed(not_a_number), "not finite"),
    "a lost row": (resealed(lose_a_row), "has shape"),
}
TOPK_MISCHIEF = {
    "an id twice": (resealed(repeat_an_id), "occurs twice"),
    "an id beyond the vocabulary": (resealed(set_number("ids", 0, 512)), "out of range"),
    "a row that is not sorted": (resealed(swap_two), "not sorted"),
    "an infinite logit": (resealed(set_number("logits", 0, np.inf)), "not finite"),
    "more mass than there is": (resealed(set_number("logsumexp", 0, -100.0)), "more mass"),
    "a target logit that is none": (resealed(set_number("target_logits", 0, np.nan)), "not finite"),
    "other temperatures": (resealed(lambda frame: frame.logsumexp.CopyFrom(frame.logits)), "has shape"),
}


CANDIDATES_MISCHIEF = {
    "a logit of an absent candidate": (resealed(set_number("logits", 2, 1.0)), "absent candidate"),
    "a candidate without a logit": (resealed(set_number("logits", 0, -np.inf)), "not finite"),
    "a log-sum-exp that is none": (resealed(set_number("logsumexp", 0, np.nan)), "not finite"),
    "a row too few": (resealed(lambda frame: frame.logits.CopyFrom(frame.logsumexp)), "has shape"),
}


@pytest.mark.parametrize("name", HIDDEN_MISCHIEF)
def test_a_damaged_answer_is_refused_by_name(name, client, servicer):
    servicer.mischief, problem = HIDDEN_MISCHIEF[name]
    with pytest.raises(CorruptFrame, match=problem):
        client.score(requests(), HIDDEN)


@pytest.mark.parametrize("name", TOPK_MISCHIEF)
def test_topk_that_is_no_distribution_is_refused_by_name(name, client, servicer):
    servicer.mischief, problem = TOPK_MISCHIEF[name]
    with pytest.raises(CorruptFrame, match=problem):
        client.score(requests(), TOPK)


@pytest.mark.parametrize("name", CANDIDATES_MISCHIEF)
def test_candidates_that_were_not_asked_for_are_refused_by_name(name, client, servicer):
    servicer.mischief, problem = CANDIDATES_MISCHIEF[name]
    candidates = np.array([[1, 2, -1]] * 6, np.int32)
    asked = [TokenSequence(np.arange(8, dtype=np.int32), 0, 6, candidates)]
    with pytest.raises(CorruptFrame, match=problem):
        client.score(asked, SignalSpec("candidates", temperatures=(1.0,)))


def test_an_unembedding_that_was_not_announced_is_refused(client, servicer):
    servicer.spoil_unembedding = True
    with pytest.raises(CorruptFrame, match="announced"):
        client.unembedding()


@pytest.mark.parametrize("frames", [0, 1, 3, 7])
def test_a_broken_stream_is_asked_again_and_gives_the_same(frames, client, servicer, in_process):
    servicer.abort_after_frames = [frames, frames]
    assert_same(client.score(requests(), HIDDEN), in_process.score(requests(), HIDDEN))
    assert client.waited_seconds > 0


def test_a_full_teacher_is_asked_again_and_a_refusal_is_final(client, servicer, in_process):
    servicer.refusals = [pb.Refusal(code=8, message="full", retry_after_milliseconds=10)]
    assert_same(client.score(requests(), HIDDEN), in_process.score(requests(), HIDDEN))
    servicer.refusals = [pb.Refusal(code=3, field="signal.k", message="too large")]
    with pytest.raises(InvalidRequest, match="too large"):
        client.score(requests(), TOPK)


def test_a_teacher_that_dies_and_comes_back_costs_only_waiting(servicer, in_process, tiny_model):
    waits: list[str] = []
    with serving(servicer) as address:
        client = connect(address, tiny_model, waiting=lambda seconds, reason: waits.append(reason))
        client.score(requests(), HIDDEN)
    back = threading.Event()

    def come_back():
        time.sleep(1.0)
        with serving(servicer, address):
            back.wait()

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert_same(client.score(requests(), HIDDEN), in_process.score(requests(), HIDDEN))
    finally:
        back.set()
        thread.join()
        client.close()
    assert waits
    assert address in waits[0]


class AnsweringOne(FaultyServicer):
    """Full again after each request that it has answered."""

    def ScoreSequences(self, request_iterator, context):  # noqa: N802
        context.send_initial_metadata([(INSTANCE_METADATA_KEY, self.info.instance_id)])
        requests = list(request_iterator)
        self.refusals = []
        yield from self._answer(requests[0])
        self.refusals = [pb.Refusal(code=8, message="full", retry_after_milliseconds=300)] * len(requests)
        for request in requests[1:]:
            yield from self._answer(request)


def test_a_slow_teacher_is_not_one_that_is_away(in_process, tiny_model):
    with (
        serving(AnsweringOne(in_process, tiny_model)) as address,
        connect(address, tiny_model, wait_seconds=1.4) as client,
    ):
        assert_same(client.score(requests(6), HIDDEN), in_process.score(requests(6), HIDDEN))
    assert client.waited_seconds >= 5 * 0.3


def test_waiting_ends_with_advice_and_can_be_stopped(tiny_model):
    begin = time.monotonic()
    with pytest.raises(Unreachable, match="is it started"):
        connect("127.0.0.1:1", tiny_model, wait_seconds=0.5)
    assert time.monotonic() - begin < 5
    control = Control()
    control.stop()
    with pytest.raises(Stopped):
        connect("127.0.0.1:1", tiny_model, waiting=lambda seconds, reason: control.check_stopped())


def test_another_teacher_at_the_same_address_stops_the_run(client, servicer):
    servicer.info.weights_digest, servicer.info.instance_id = "f" * 64, "the next process"
    with pytest.raises(IdentityMismatch, match="serve that teacher again"):
        client.score(requests(), HIDDEN)


def test_a_teacher_with_another_chat_template_is_refused_unless_it_need_not_be_the_same(servicer, tiny_model):
    servicer.info.chat_template_digest = "1" * 64
    with serving(servicer) as address:
        with pytest.raises(IdentityMismatch, match=r"chat_template: student") as refused:
            connect(address, tiny_model, chat_template_digest="2" * 64)
        assert refused.value.field == "data.chat_template"
        for accepted in ("1" * 64, ""):
            connect(address, tiny_model, chat_template_digest=accepted).close()
        servicer.info.chat_template_digest = ""  # a base model that has none
        connect(address, tiny_model, chat_template_digest="2" * 64).close()


def test_the_tokens_that_end_a_text_for_the_teacher_are_known(servicer, tiny_model):
    servicer.info.end_token_ids.extend([0, 2])
    with serving(servicer) as address, connect(address, tiny_model) as client:
        assert client.identity.end_token_ids == (0, 2)


def test_a_teacher_with_another_tokenizer_is_refused(servicer, tiny_model):
    servicer.info.tokenizer_digests["merges"] = "0"
    with serving(servicer) as address, pytest.raises(IdentityMismatch, match="differ in merges"):
        connect(address, tiny_model)


def test_a_teacher_that_only_writes_is_refused(servicer, tiny_model):
    servicer.info.roles[:] = [pb.TEACHER_ROLE_WRITE]
    with serving(servicer) as address, pytest.raises(NotServed, match="role score"):
        connect(address, tiny_model)
