"""A teacher that scores and generates, given whatever the contract allows at once: no request ends its engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_process import TeacherProcess, running
from tutelage.rpc.codec import decode, encode
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

LONGEST, VOCABULARY = 512, 512
WORD_PROBLEMS = [
    f"Ann has {n} apples and buys {n * 7} more at the market. She gives {n + 2} of them to Ben, who has {n * 3} pears, "
    "and puts the others into bags of four. How many bags does she need?"
    for n in range(3, 11)
]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[TeacherProcess]:
    options = ("--roles", "score,write", "--kv-cache-memory-bytes", str(2**26))
    with running(tmp_path_factory.mktemp("teacher"), tiny_model, *options) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server) -> Iterator[pb_grpc.TeacherServiceStub]:
    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.TeacherServiceStub(channel)


def request(prompt: list[int], **fields) -> pb.WriteRationalesRequest:
    ids = encode(np.array(prompt, np.int32))
    return pb.WriteRationalesRequest(request_id="w", prompt_token_ids=ids, **fields)


def generate(stub, asked: pb.WriteRationalesRequest) -> tuple[list[list[int]], list[str]]:
    """Token ids and the finish reason of each sample."""
    token_ids = [[] for _ in range(asked.samples or 1)]
    reasons = [""] * len(token_ids)
    for response in stub.WriteRationales(asked, timeout=120):
        assert response.HasField("generated"), response
        token_ids[response.sample_index] += decode(response.generated.token_ids).tolist()
        reasons[response.sample_index] = response.generated.finish_reason
    return token_ids, reasons


def generate_all(stub, asked: list[pb.WriteRationalesRequest]) -> list[tuple[list[list[int]], list[str]]]:
    """All at once; each has ended as it should."""
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda one: generate(stub, one), asked))
    for one, (token_ids, reasons) in zip(asked, answers, strict=True):
        assert set(reasons) <= {"stop", "length"}
        assert all(len(ids) <= one.max_new_tokens for ids in token_ids)
    return answers


def score(stub, token_ids: list[int]) -> None:
    spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=8, temperatures=[1.0])
    asked = pb.ScoreSequencesRequest(request_id="s", token_ids=encode(np.array(token_ids, np.int32)), signal=spec)
    assert [answer.WhichOneof("outcome") for answer in stub.ScoreSequences(iter([asked]), timeout=60)] == ["frame"]


def test_seeded_prompts_that_do_not_fit_one_batch_are_answered(stub, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer(text).input_ids for text in WORD_PROBLEMS]
    assert sum(map(len, prompts)) > 512  # tokens of a batch on a CPU
    generate_all(stub, [request(ids, samples=2, temperature=0.8, max_new_tokens=40, seed=7) for ids in prompts])
    score(stub, prompts[0])


@st.composite
def generation_requests(draw) -> pb.WriteRationalesRequest:
    """Anything that the contract allows."""
    max_new_tokens = draw(st.integers(1, 48) | st.just(LONGEST - 1))
    length = draw(st.integers(1, LONGEST - max_new_tokens) | st.just(LONGEST - max_new_tokens))
    first = draw(st.integers(0, VOCABULARY - 1))
    prompt = [(first + 7 * position) % VOCABULARY for position in range(length)]
    temperature = draw(st.just(0.0) | st.floats(1e-6, 2.0))
    return request(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=draw(st.integers(0, 4)) if temperature > 0 else 1,
        top_p=draw(st.just(0.0) | st.floats(0.001, 1.0)),
        seed=draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1])),
        stop=draw(st.lists(st.text(min_size=1, max_size=4), max_size=3)),
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.long)])
def test_any_requests_at_once_are_answered(examples, stub):
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(generation_requests(), min_size=1, max_size=24))
    def answered(asked):
        generate_all(stub, asked)

    answered()
    score(stub, [1, 2, 3])


# The last of this file: it ends the engine that the others ask.
def test_a_dead_generating_engine_leaves_the_scoring_one_serving(server, stub):
    _, generating = server.engines  # in the order of the roles
    generating.kill()
    deadline = time.monotonic() + 30
    while "the generating engine died" not in server.log.read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as refused:
        generate(stub, request([1, 2, 3], max_new_tokens=2))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    score(stub, [1, 2, 3])
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
    assert health.status == health_pb2.HealthCheckResponse.SERVING
