"""Requests that nobody should send: every field wild, malformed bytes, too much, too often. Nothing breaks or swells.

Short forms run always; the long ones send 2,000 requests, 20,000 malformed messages and 50,000 cancelled streams.
"""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from collections import Counter

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_teacher import VOCABULARY_SIZE
from restartable_teacher import restartable_teacher
from tutelage.errors import InvalidRequest, NotServed
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.admission.validation import Scoring, Validator

ALLOWED_GROWTH_BYTES = 64 * 2**20
LIMITS = pb.Limits(max_sequence_tokens=2000, max_k=64, max_temperatures=4, max_samples=4)
VALIDATOR = Validator(
    LIMITS,
    vocabulary_size=VOCABULARY_SIZE,
    kinds=[pb.SIGNAL_KIND_TOPK, pb.SIGNAL_KIND_CANDIDATES, pb.SIGNAL_KIND_HIDDEN],
    roles=[pb.TEACHER_ROLE_SCORE, pb.TEACHER_ROLE_WRITE],
)

uint32 = st.one_of(st.integers(0, 70), st.sampled_from([2**16, 2**31 - 1, 2**31, 2**32 - 1]))
numbers = st.floats(width=32)  # NaN and infinities among them
dtypes = st.one_of(st.integers(0, 6), st.integers(-(2**31), 2**31 - 1))
wild_tensors = st.builds(pb.Tensor, dtype=dtypes, shape=st.lists(uint32, max_size=4), data=st.binary(max_size=200))
texts = st.text(alphabet="aZ9. \0\n\u00e9\u202e\U0001f600", max_size=140)  # NUL, an accent, right to left, an emoji


@st.composite
def id_tensors(draw, dimensions: int) -> pb.Tensor:
    shape = draw(st.tuples(*[st.integers(0, 8)] * dimensions))
    values = draw(st.lists(st.integers(-2, VOCABULARY_SIZE), min_size=math.prod(shape), max_size=math.prod(shape)))
    return encode(np.array(values, dtype=np.int32).reshape(shape))


def tensors(dimensions: int):
    return st.one_of(id_tensors(dimensions), wild_tensors)


specs = st.builds(
    pb.SignalSpec,
    kind=st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
    k=uint32,
    temperatures=st.lists(st.one_of(st.sampled_from([0.5, 1.0, 2.0]), numbers), max_size=5),
    candidate_ids=st.one_of(st.none(), tensors(2)),
)
scoring_requests = st.builds(
    pb.ScoreSequencesRequest,
    request_id=texts,
    token_ids=tensors(1),
    signal=specs,
    score_start=uint32,
    score_end=uint32,
)
generation_requests = st.builds(
    pb.WriteRationalesRequest,
    request_id=texts,
    prompt_token_ids=tensors(1),
    samples=uint32,
    max_new_tokens=uint32,
    temperature=numbers,
    top_p=numbers,
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(texts, max_size=10),
    signal=st.one_of(st.none(), specs),
)


def has_path(message, path: str) -> bool:
    """Whether `signal.k` or `stop[1]` names a field of a message."""
    descriptor = message.DESCRIPTOR
    for name in path.split("."):
        field = descriptor.fields_by_name.get(name.partition("[")[0])
        if field is None:
            return False
        descriptor = field.message_type
    return True


def checked(validate, request):
    """What the validator makes of it; None if it is refused, which must be by the name of a field."""
    refused = None
    try:
        return validate(request)
    except (InvalidRequest, NotServed) as error:
        refused = error
    assert has_path(request, refused.field), refused
    return None


def check_scoring(request: pb.ScoreSequencesRequest) -> None:
    """If it is allowed, nothing about it can hurt an engine."""
    scoring: Scoring | None = checked(VALIDATOR.scoring, request)
    if scoring is None:
        return
    signal, ids = scoring.signal, scoring.token_ids
    assert 1 <= len(ids) <= LIMITS.max_sequence_tokens
    assert ((ids >= 0) & (ids < VOCABULARY_SIZE)).all()
    assert 0 <= scoring.start < scoring.end <= len(ids)
    assert 0 <= signal.k <= LIMITS.max_k
    assert all(math.isfinite(T) and T > 0 for T in signal.temperatures)
    if signal.candidate_ids_RC is not None:
        rows, columns = signal.candidate_ids_RC.shape
        assert rows == scoring.end - scoring.start
        assert 1 <= columns <= LIMITS.max_k


def check_generation(request: pb.WriteRationalesRequest) -> None:
    """As `check_scoring`."""
    generation = checked(VALIDATOR.generation, request)
    if generation is None:
        return
    sampling, room = generation.sampling, LIMITS.max_sequence_tokens
    assert 1 <= len(generation.prompt_token_ids) < len(generation.prompt_token_ids) + sampling.max_new_tokens <= room
    assert 1 <= sampling.samples <= LIMITS.max_samples
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1


@pytest.mark.parametrize("examples", [150, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("strategy", "check"), [(scoring_requests, check_scoring), (generation_requests, check_generation)]
)
def test_any_fields_are_allowed_and_harmless_or_refused_by_name(strategy, check, examples):
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def every(request):
        tracemalloc.start()
        try:
            check(request)
            assert tracemalloc.get_traced_memory()[1] < ALLOWED_GROWTH_BYTES
        finally:
            tracemalloc.stop()

    every()


@pytest.fixture(scope="module")
def teacher():
    with restartable_teacher() as teacher:
        yield teacher


@pytest.fixture
def channel(teacher):
    options = [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 2**24)]
    with grpc.insecure_channel(teacher.address, options=options) as channel:
        yield channel


def good_request(request_id: str = "good") -> pb.ScoreSequencesRequest:
    spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=4, temperatures=[1.0])
    return pb.ScoreSequencesRequest(request_id=request_id, token_ids=encode(np.arange(20, dtype=np.int32)), signal=spec)


@pytest.fixture(autouse=True)
def unharmed(request):
    """After each test with a server: it is healthy, answers, has no stream left, and has not grown."""
    if "channel" not in request.fixturenames:
        yield
        return
    channel, teacher = request.getfixturevalue("channel"), request.getfixturevalue("teacher")
    stub, process = pb_grpc.TeacherServiceStub(channel), psutil.Process(teacher.process_id)
    (before,) = stub.ScoreSequences(iter([good_request()]), timeout=10)
    resident_bytes = process.memory_info().rss
    yield
    (after,) = stub.ScoreSequences(iter([good_request()]), timeout=30)
    assert after == before
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    deadline = time.monotonic() + 30
    while any(student.open_streams for student in stub.GetTeacherUsage(pb.GetTeacherUsageRequest()).students):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.memory_info().rss - resident_bytes < ALLOWED_GROWTH_BYTES


def test_wild_requests_on_one_stream_get_a_frame_or_a_refusal_each(channel):
    requests = []

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(scoring_requests)
    def collect(request):
        request.request_id = str(len(requests))
        requests.append(request)

    collect()
    ended = Counter()
    for response in pb_grpc.TeacherServiceStub(channel).ScoreSequences(iter(requests), timeout=60):
        if response.HasField("refusal"):
            assert response.refusal.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert has_path(requests[int(response.request_id)], response.refusal.field)
        ended[response.request_id] += response.HasField("refusal") or response.frame.last
    assert ended == Counter(map(str, range(len(requests))))


def malformed(generator: random.Random) -> bytes:
    """Random, truncated, bit-flipped, deeply nested, or of a length that is a lie."""
    valid = good_request().SerializeToString()
    choices = {
        0: lambda: generator.randbytes(generator.randrange(200)),
        1: lambda: valid[: generator.randrange(len(valid))],
        2: lambda: _flipped(valid, generator),
        3: lambda: b"\x0b" * generator.randrange(10_000),  # groups within groups
        4: lambda: b"\x12\xff\xff\xff\xff\x07" + valid,  # token_ids of 2³¹ - 1 bytes
        5: lambda: b"\x1a" + bytes([generator.randrange(128)]) + valid,
    }
    return choices[generator.randrange(len(choices))]()


def _flipped(message: bytes, generator: random.Random) -> bytes:
    changed = bytearray(message)
    for _ in range(generator.randrange(1, 4)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
EXPECTED_CODES = {"OK", "INTERNAL", "UNKNOWN", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}


@pytest.mark.parametrize("messages", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_malformed_messages(messages, channel):
    generator, codes = random.Random(messages), Counter()
    score = channel.stream_stream(f"/{SERVICE}/ScoreSequences")
    others = [channel.unary_stream(f"/{SERVICE}/{method}") for method in ("WriteRationales", "GetUnembedding")]
    others.append(channel.unary_unary(f"/{SERVICE}/GetTeacherInfo"))
    for number in range(messages):
        message = malformed(generator)
        try:
            if number % 4:
                list(score(iter([message]), timeout=30))
            else:
                answer = others[number // 4 % 3](message, timeout=30)
                list(answer) if not isinstance(answer, bytes) else answer
            codes["OK"] += 1
        except grpc.RpcError as error:
            codes[error.code().name] += 1
    assert set(codes) <= EXPECTED_CODES, codes
    assert codes["OK"] < messages


def test_messages_that_are_too_large(channel):
    stub = pb_grpc.TeacherServiceStub(channel)
    request = good_request()
    envelope = request.ByteSize() + 100
    request.token_ids.CopyFrom(encode(np.zeros((MAX_MESSAGE_BYTES - envelope) // 4, dtype=np.int32)))
    (response,) = stub.ScoreSequences(iter([request]), timeout=30)
    assert response.refusal.field == "token_ids"
    request.token_ids.CopyFrom(encode(np.zeros(MAX_MESSAGE_BYTES // 4, dtype=np.int32)))
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.ScoreSequences(iter([request]), timeout=30))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = [("x-large", "y" * 2**17)]
    with pytest.raises(grpc.RpcError) as refused:
        stub.GetTeacherInfo(pb.GetTeacherInfoRequest(), metadata=metadata, timeout=30)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def processor_seconds(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


@pytest.mark.parametrize("streams", [500, pytest.param(50_000, marks=pytest.mark.long)])
def test_streams_that_are_opened_and_cancelled_at_once(streams, channel, teacher):
    stub = pb_grpc.TeacherServiceStub(channel)
    for number in range(streams):
        call = stub.ScoreSequences(iter([good_request(str(number))]), timeout=30)
        call.cancel()
    process = psutil.Process(teacher.process_id)
    spent = processor_seconds(process)
    while process.cpu_percent(0.5) > 50:  # it comes to rest, and does not go on with what nobody waits for
        assert processor_seconds(process) - spent < 2
