"""Several servers of one teacher: shared by tokens and by prompt, lost without loss, refused if they are another's."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import IdentityMismatch, InvalidRequest, Unreachable
from tutelage.identity import tokenizer_digests
from tutelage.rpc.transport import Endpoint, endpoints
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.teacher.routing import Server, Servers

HIDDEN = SignalSpec("hidden")


class CountingServicer(FaultyServicer):
    """Knows which sequences it was asked for, and can be slow."""

    def __init__(self, teacher: InProcessTeacher, folder: Path, name: str) -> None:
        super().__init__(teacher, folder)
        self.info.instance_id = name
        self.asked: list[bytes] = []
        self.seconds = 0.0

    def _answer(self, request):
        self.asked.append(request.token_ids.data)
        time.sleep(self.seconds)
        return super()._answer(request)


@pytest.fixture(scope="module")
def in_process(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture
def servicers(in_process, tiny_model):
    return [CountingServicer(in_process, tiny_model, name) for name in ("first", "second", "third")]


@pytest.fixture
def addresses(servicers):
    with ExitStack() as stack:
        yield [stack.enter_context(serving(servicer)) for servicer in servicers]


@pytest.fixture
def connect(tiny_model):
    with ExitStack() as stack:

        def connect(addresses, **changes) -> TeacherClient:
            values = {"student_id": "ann", "wait_seconds": 20.0, "tokenizer_digests": tokenizer_digests(tiny_model)}
            return stack.enter_context(TeacherClient(addresses, **(values | changes)))

        yield connect


def requests(prompts: int, completions: int = 1, prompt_tokens: int = 12) -> list[TokenSequence]:
    """Completions of 6 tokens of some prompts."""
    generator = np.random.default_rng(prompts)
    asked = []
    for prompt in generator.integers(3, 500, (prompts, prompt_tokens)):
        for completion in generator.integers(3, 500, (completions, 6)):
            ids = np.concatenate([prompt, completion]).astype(np.int32)
            asked.append(TokenSequence(ids, prompt_tokens - 1, len(ids), prompt_tokens=prompt_tokens))
    return asked


def assert_same(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert np.array_equal(array, other[name]), name


def asked_of(servicers, sequences) -> Counter[int]:
    """How many of the sequences each servicer was asked for, by its place."""
    wanted = {sequence.ids.tobytes() for sequence in sequences}
    return Counter({place: sum(ids in wanted for ids in each.asked) for place, each in enumerate(servicers)})


def test_all_servers_take_their_share(servicers, addresses, connect, in_process):
    client, asked = connect(addresses), requests(30)
    assert client.servers == tuple(addresses)
    assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
    shares = asked_of(servicers, asked)
    assert sum(shares.values()) == 30
    assert min(shares.values()) >= 7


def test_completions_of_a_prompt_go_to_one_server_whoever_asks(servicers, addresses, connect):
    asked = requests(6, completions=4, prompt_tokens=50)
    for student in ("ann", "bob"):
        client = connect(addresses, student_id=student)
        for first in range(0, len(asked), 4):
            client.score(asked[first : first + 4], HIDDEN)
    prompts = [sequence.ids[:50].tobytes() for sequence in asked[::4]]
    by_server = [Counter(ids[: 50 * 4] for ids in each.asked) for each in servicers]
    for prompt in prompts:
        assert sorted(asked[prompt] for asked in by_server) == [0, 0, 8]


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_what_a_server_owes_is_asked_of_the_others_without_waiting(
    frames, servicers, addresses, connect, in_process, caplog
):
    client, asked = connect(addresses), requests(30)
    servicers[1].abort_after_frames = [frames]
    with caplog.at_level(logging.WARNING):
        assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
    assert client.waited_seconds == 0
    assert f"the teacher at {addresses[1]} is away" in caplog.text
    deadline = time.monotonic() + 10
    while len(client.servers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    more = requests(40)
    client.score(more, HIDDEN)
    assert asked_of(servicers, more)[1] > 0, "a server that is back takes part again"


def test_a_full_server_owes_its_requests_to_the_others(servicers, addresses, connect, in_process):
    client, asked = connect(addresses), requests(30)
    servicers[0].refusals = [pb.Refusal(code=8, message="full", retry_after_milliseconds=60_000)] * 30
    assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
    assert client.waited_seconds == 0


def test_what_one_server_does_not_serve_is_asked_of_another_and_what_none_serves_is_refused(
    servicers, addresses, connect, in_process
):
    client, asked = connect(addresses), requests(30)
    servicers[0].refusals = [pb.Refusal(code=3, field="token_ids", message="longer than I take")] * 30
    assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
    for servicer in servicers:
        servicer.refusals = [pb.Refusal(code=3, field="token_ids", message="longer than I take")] * 90
    with pytest.raises(InvalidRequest, match="longer than I take"):
        client.score(requests(3), HIDDEN)


def test_a_server_that_is_away_at_the_start_takes_part_when_it_comes(servicers, connect, in_process):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        late = f"127.0.0.1:{probe.getsockname()[1]}"
    with serving(servicers[0]) as first:
        client = connect([late, first])
        assert client.servers == (first,)
        with serving(servicers[1], late):
            deadline = time.monotonic() + 20
            while len(client.servers) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            asked = requests(30)
            assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
            assert asked_of(servicers, asked)[1] > 0


def other_weights(servicer):
    servicer.info.weights_digest = "f" * 64


def other_tokenizer(servicer):
    servicer.info.tokenizer_digests["merges"] = "0"


def no_scoring(servicer):
    servicer.info.roles[:] = [pb.TEACHER_ROLE_WRITE]


def other_answers(servicer):
    real = servicer._teacher

    class Quantized:
        identity = real.identity

        def signals(self, sequence, spec):
            answer = dict(real.signals(sequence, spec))
            if "logits_RK" in answer:
                answer["logits_RK"] = answer["logits_RK"] + np.linspace(
                    -0.5, 0, answer["logits_RK"].shape[1], dtype="f4"
                )
            return answer

    servicer._teacher = Quantized()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (other_weights, "has weights ffffffffffff"),
        (other_tokenizer, "differ in merges"),
        (other_answers, "answers otherwise: KL"),
        (no_scoring, "does not score"),
    ],
)
def test_another_teacher_among_the_servers_is_named_and_not_used(
    change, problem, servicers, addresses, connect, in_process, caplog
):
    change(servicers[2])
    with caplog.at_level(logging.WARNING):
        client = connect(addresses)
    assert client.servers == tuple(addresses[:2])
    assert f"the teacher at {addresses[2]} is not used" in caplog.text
    assert problem in caplog.text
    asked = requests(30)
    assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
    assert asked_of(servicers, asked)[2] == 0
    assert caplog.text.count("is not used") == 1, "said once, however often it is asked again"


def test_a_server_that_comes_back_as_another_teacher_is_not_used(servicers, addresses, connect, in_process, caplog):
    client, asked = connect(addresses), requests(30)
    other_weights(servicers[1])
    servicers[1].info.instance_id = "the next process"
    with caplog.at_level(logging.WARNING):
        assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
        time.sleep(0.7)
    assert client.servers == (addresses[0], addresses[2])
    assert f"the teacher at {addresses[1]} is not used" in caplog.text


def test_where_no_server_is_the_teacher_the_run_is_refused(servicers, addresses, connect):
    for servicer in servicers:
        other_tokenizer(servicer)
    with pytest.raises(IdentityMismatch, match="differ in merges"):
        connect(addresses)


def test_the_unembedding_comes_from_a_server_that_is_there(servicers, addresses, connect, in_process):
    client = connect(addresses)
    servicers[0].GetUnembedding = lambda request, context: context.abort_with_status(None)
    with serving(servicers[1]):
        client._servers.lose(client._servers.taking_part[0], Unreachable("gone"))
        assert np.array_equal(client.unembedding().rows_VD, in_process.unembedding().rows_VD)


def test_a_name_stands_for_all_its_servers(servicers, connect, in_process, monkeypatch):
    with serving(servicers[0]) as first:
        port = int(first.rpartition(":")[2])
        with serving(servicers[1], f"127.0.0.2:{port}"):
            hosts = ["127.0.0.2", "127.0.0.1"]
            monkeypatch.setattr(
                socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (each, port)) for each in hosts]
            )
            assert endpoints(f"dns:///teachers:{port}") == [
                Endpoint(f"127.0.0.1:{port}", "teachers"),
                Endpoint(f"127.0.0.2:{port}", "teachers"),
            ]
            client, asked = connect(f"dns:///teachers:{port}"), requests(30)
            assert client.servers == (f"127.0.0.1:{port}", f"127.0.0.2:{port}")
            assert_same(client.score(asked, HIDDEN), in_process.score(asked, HIDDEN))
            assert min(asked_of(servicers[:2], asked).values()) > 5


def test_a_name_that_nobody_knows_is_waited_for(connect, monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match="dns:///teachers:1 cannot be resolved"):
        connect("dns:///teachers:1", wait_seconds=0.5)


# What follows is the choice alone, without a network.


class NoConnection:
    def __init__(self, address: str) -> None:
        self.address = address


def two_servers(**limits: int) -> tuple[Servers, list[Server]]:
    servers = Servers([], lambda _: None, None)
    both = [
        Server(NoConnection(f"host-{name}:1"), pb.GetTeacherInfoResponse(limits=pb.Limits(**limits)))
        for name in ("a", "b")
    ]
    servers._servers = {server.address: server for server in both}
    return servers, both


def test_the_fewest_outstanding_tokens_go_first():
    servers, (a, b) = two_servers()
    sequences = [TokenSequence(np.full(length, length, np.int32), 0, length) for length in (900, 500, 300, 100, 90)]
    places = [servers.ask(sequence).server for sequence in sequences]
    assert sorted((a.outstanding_tokens, b.outstanding_tokens)) == [900, 990]
    assert places[0] is not places[1]


def test_a_prefix_stays_until_its_server_is_far_behind():
    servers, both = two_servers()
    sequences = requests(1, completions=60, prompt_tokens=100)
    asked = [servers.ask(sequence) for sequence in sequences]
    home = asked[0].server
    assert asked[0].tokens == 106
    assert asked[1].tokens == 6, "what is computed, not what is sent"
    stayed = sum(each.server is home for each in asked)
    # 106 and then 6 each, until 200 more than at the other, which then has the prefix too.
    assert [each.server is home for each in asked[:17]] == [True] * 17
    assert stayed < 60
    gap = abs(both[0].outstanding_tokens - both[1].outstanding_tokens)
    assert gap <= 206
    for each in asked:
        servers.done(each, answered=True)
    assert [server.outstanding_tokens for server in both] == [0, 0]
    assert [server.outstanding.total() for server in both] == [0, 0]


def test_a_server_has_no_more_in_flight_than_it_reads():
    servers, _ = two_servers(max_requests_in_flight=2)
    asked = [servers.ask(sequence) for sequence in requests(5)]
    assert asked[4] is None
    servers.done(asked[0], answered=True)
    assert servers.ask(requests(1)[0]).server is asked[0].server
