"""The service over real gRPC, around engines that are a few tensor operations (tests/fake_teacher.py)."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
from collections import defaultdict
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fake_teacher import (
    HIDDEN_SIZE,
    VOCABULARY_SIZE,
    FakeGenerationEngine,
    FakeScoringEngine,
    fake_head,
    fake_teacher,
    serving,
)
from tutelage.errors import TutelageError
from tutelage.rpc.codec import decode, encode, frame_checksum, sequence_digest
from tutelage.rpc.transport import CHANNEL_OPTIONS, STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.server import server as server_module

RNG = np.random.default_rng(0)


def tokens(length: int) -> np.ndarray:
    return RNG.integers(0, VOCABULARY_SIZE, length).astype(np.int32)


def topk(request_id: str, token_ids: np.ndarray, *, k: int = 5, **fields) -> pb.ScoreSequencesRequest:
    signal = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=k, temperatures=[1.0, 2.0])
    return pb.ScoreSequencesRequest(request_id=request_id, token_ids=encode(token_ids), signal=signal, **fields)


def hidden(request_id: str, token_ids: np.ndarray) -> pb.ScoreSequencesRequest:
    signal = pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN)
    return pb.ScoreSequencesRequest(request_id=request_id, token_ids=encode(token_ids), signal=signal)


@pytest.fixture
async def connect():
    channels = []

    def stub(address: str, kind=pb_grpc.TeacherServiceStub):
        channels.append(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
        return kind(channels[-1])

    yield stub
    for channel in channels:
        await channel.close()


async def answers_of(call) -> dict[str, list[pb.ScoreSequencesResponse]]:
    answers = defaultdict(list)
    async for response in call:
        answers[response.request_id].append(response)
    return answers


def reference_logits(engine: FakeScoringEngine, token_ids: np.ndarray) -> np.ndarray:
    states = engine.embeddings[token_ids.tolist()].cumsum(0).bfloat16()
    return states.double().numpy() @ fake_head().unembedding.weight_VD.double().numpy().T


async def test_many_requests_on_one_stream(connect):
    engine = FakeScoringEngine(seconds=0.02)
    sequences = {f"request-{length}": tokens(length) for length in [1, 2, 3, 17, 400, 1999, 2000, *range(30, 50)]}
    async with serving(fake_teacher(engine, frame_bytes=64 * 2**10)) as server:
        call = connect(server.address).ScoreSequences(topk(name, ids, k=60) for name, ids in sequences.items())
        answers = await answers_of(call)
    assert answers.keys() == sequences.keys()
    for name, token_ids in sequences.items():
        frames = [response.frame for response in answers[name]]
        assert [frame.frame_index for frame in frames] == list(range(len(frames)))
        assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
        for frame in frames:
            assert frame.checksum == frame_checksum(frame)
            assert frame.sequence_digest == sequence_digest(token_ids)
        logits = reference_logits(engine, token_ids)
        kept, ids = (np.concatenate([decode(getattr(frame, part)) for frame in frames]) for part in ("logits", "ids"))
        np.testing.assert_allclose(kept, -np.sort(-logits, axis=1)[:, :60], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(kept, np.take_along_axis(logits, ids.astype(int), axis=1), rtol=1e-4, atol=1e-3)
        target_logits = np.concatenate([decode(frame.target_logits) for frame in frames])
        expected = logits[np.arange(len(token_ids) - 1), token_ids[1:]]
        np.testing.assert_allclose(target_logits, expected, rtol=1e-4, atol=1e-3)
    assert len(answers["request-2000"]) > 5


async def test_answers_interleave(connect):
    class OneSlow(FakeScoringEngine):
        async def hidden_states(self, token_ids, first=0, salt=""):
            await asyncio.sleep(0.3 if len(token_ids) == 7 else 0)
            return await super().hidden_states(token_ids, first, salt)

    order = []
    async with serving(fake_teacher(OneSlow())) as server:
        requests = [topk("slow", tokens(7)), *(topk(f"quick-{i}", tokens(5)) for i in range(5))]
        async for response in connect(server.address).ScoreSequences(iter(requests)):
            order.append(response.request_id)
    assert order[-1] == "slow"
    assert len(order) == 6


async def test_a_refusal_leaves_the_others_alone(connect):
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        requests = [
            topk("good-1", tokens(9)),
            topk("bad-k", tokens(9), k=65),
            topk("bad-ids", np.array([VOCABULARY_SIZE], dtype=np.int32)),
            topk("bad-range", tokens(9), score_start=9),
            topk("", tokens(9)),
            topk("good-2", tokens(9)),
        ]
        stub = connect(server.address)
        answers = await answers_of(stub.ScoreSequences(iter(requests)))
        usage = await stub.GetTeacherUsage(pb.GetTeacherUsageRequest())
    refusals = {name: answer[0].refusal for name, answer in answers.items() if answer[0].HasField("refusal")}
    fields = {name: refusal.field for name, refusal in refusals.items()}
    assert fields == {"bad-k": "signal.k", "bad-ids": "token_ids", "bad-range": "score_start", "": "request_id"}
    assert refusals["bad-k"].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "1 to 64" in refusals["bad-k"].message
    assert all(len(responses) == 1 for responses in answers.values())
    assert (usage.students[0].sequences, usage.students[0].refusals) == (2, 4)


async def test_the_same_id_twice_in_flight_is_refused(connect):
    async with serving(fake_teacher(FakeScoringEngine(seconds=0.2))) as server:
        call = connect(server.address).ScoreSequences(iter([topk("twin", tokens(3)), topk("twin", tokens(4))]))
        (responses,) = (await answers_of(call)).values()
    assert sorted(response.WhichOneof("outcome") for response in responses) == ["frame", "refusal"]


async def test_requests_beyond_those_in_flight_wait_unread(connect):
    engine = FakeScoringEngine(seconds=3600)
    async with serving(fake_teacher(engine, max_requests_in_flight=3)) as server:
        call = connect(server.address).ScoreSequences(topk(str(i), tokens(4)) for i in range(20))
        await _until(lambda: engine.started == 3)
        await asyncio.sleep(0.2)
        assert engine.started == 3
        call.cancel()


async def test_cancelling_frees_the_engine(connect):
    engine = FakeScoringEngine(seconds=3600)
    async with serving(fake_teacher(engine)) as server:
        stub = connect(server.address)
        call = stub.ScoreSequences(topk(str(i), tokens(4)) for i in range(5))
        await _until(lambda: engine.started == 5)
        call.cancel()
        await _until(lambda: engine.cancelled == 5)
        usage = await stub.GetTeacherUsage(pb.GetTeacherUsageRequest())
    assert (usage.students[0].open_streams, usage.students[0].sequences) == (0, 0)


async def test_a_student_that_does_not_read_holds_only_itself(connect):
    engine = FakeScoringEngine()
    async with serving(fake_teacher(engine)) as server:
        lazy = connect(server.address)
        call = lazy.ScoreSequences(hidden(str(i), tokens(2000)) for i in range(400))  # 25 MB of answers
        await _until(lambda: engine.started >= 8)
        held = 0
        while engine.started != held:  # until flow control holds the stream
            held = engine.started
            await asyncio.sleep(1.0)
        assert held < 100
        answers = await answers_of(connect(server.address).ScoreSequences(iter([topk("polite", tokens(5))])))
        assert answers["polite"][0].HasField("frame")
        assert engine.started - 1 == held
        call.cancel()


async def test_students_that_go_away_in_the_middle_of_a_write_are_nothing_to_report(connect, caplog):
    engine = FakeScoringEngine()
    async with serving(fake_teacher(engine)) as server:
        for _ in range(20):
            async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
                stub = pb_grpc.TeacherServiceStub(channel)
                call = stub.ScoreSequences(hidden(str(i), tokens(2000)) for i in range(50))
                await call.read()
        stub = connect(server.address)
        await _until_answer(stub, lambda usage: usage.students[0].open_streams == 0)
    assert [record.getMessage() for record in caplog.records] == []


async def _until_answer(stub, condition) -> None:
    async with asyncio.timeout(10):
        while not condition(await stub.GetTeacherUsage(pb.GetTeacherUsageRequest())):
            await asyncio.sleep(0.01)


async def test_candidates(connect):
    engine, token_ids = FakeScoringEngine(), tokens(12)
    ids = RNG.integers(-1, VOCABULARY_SIZE, (4, 6)).astype(np.int32)
    signal = pb.SignalSpec(kind=pb.SIGNAL_KIND_CANDIDATES, temperatures=[1.0], candidate_ids=encode(ids))
    request = pb.ScoreSequencesRequest(
        request_id="c", token_ids=encode(token_ids), signal=signal, score_start=5, score_end=9
    )
    async with serving(fake_teacher(engine)) as server:
        ((response,),) = (await answers_of(connect(server.address).ScoreSequences(iter([request])))).values()
    logits = reference_logits(engine, token_ids)[5:9]
    expected = np.where(ids >= 0, np.take_along_axis(logits, ids.clip(0), axis=1), -np.inf)
    np.testing.assert_allclose(decode(response.frame.logits), expected, rtol=1e-4, atol=1e-3)
    assert not response.frame.HasField("ids")
    np.testing.assert_allclose(
        decode(response.frame.logsumexp)[:, 0], np.log(np.exp(logits).sum(1)), rtol=1e-5, atol=1e-4
    )


async def test_hidden_and_unembedding_make_the_logits(connect):
    engine, token_ids = FakeScoringEngine(), tokens(100)
    teacher = fake_teacher(engine)
    async with serving(teacher) as server:
        stub = connect(server.address)
        info = await stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
        ((response,),) = (await answers_of(stub.ScoreSequences(iter([hidden("h", token_ids)])))).values()
        matrix = np.concatenate([decode(chunk.rows) async for chunk in stub.GetUnembedding(pb.GetUnembeddingRequest())])
        rest = [chunk async for chunk in stub.GetUnembedding(pb.GetUnembeddingRequest(row_start=90))]
    assert matrix.shape == (info.unembedding.rows, info.unembedding.columns) == (VOCABULARY_SIZE, HIDDEN_SIZE)
    weight = torch.from_numpy(matrix.copy()).view(torch.bfloat16)
    assert torch.equal(weight, fake_head().unembedding.weight_VD)
    assert [chunk.row_start for chunk in rest] == [90]
    np.testing.assert_array_equal(decode(rest[0].rows), matrix[90:])
    states = torch.from_numpy(decode(response.frame.hidden).copy()).view(torch.bfloat16)
    logits = states.double() @ weight.double().T
    np.testing.assert_allclose(logits.numpy(), reference_logits(engine, token_ids))


async def test_the_unembedding_comes_in_chunks_with_checksums(connect):
    import zlib

    async with serving(fake_teacher(FakeScoringEngine(), frame_bytes=1000)) as server:
        chunks = [chunk async for chunk in connect(server.address).GetUnembedding(pb.GetUnembeddingRequest())]
    assert [chunk.row_start for chunk in chunks] == [0, 31, 62, 93]
    assert [chunk.last for chunk in chunks] == [False, False, False, True]
    assert all(chunk.checksum == zlib.crc32(chunk.rows.data) for chunk in chunks)


async def test_writing_with_signals(connect):
    request = pb.WriteRationalesRequest(
        request_id="w",
        prompt_token_ids=encode(np.array([1, 2, 3], dtype=np.int32)),
        samples=2,
        max_new_tokens=4,
        temperature=1.0,
        seed=5,
        signal=pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=3, temperatures=[1.0]),
    )
    engine = FakeScoringEngine()
    async with serving(fake_teacher(engine, FakeGenerationEngine())) as server:
        stub = connect(server.address)
        responses = [response async for response in stub.WriteRationales(request)]
        usage = await stub.GetTeacherUsage(pb.GetTeacherUsageRequest())
    for sample in range(2):
        own = [response for response in responses if response.sample_index == sample]
        written = [response.generated for response in own if response.HasField("generated")]
        token_ids = np.concatenate([decode(piece.token_ids) for piece in written])
        assert token_ids.tolist() == [9 + sample, 10 + sample, 11 + sample, 12 + sample]
        assert "".join(piece.text for piece in written) == "".join(f"<{token}>" for token in token_ids)
        assert [piece.finish_reason for piece in written] == ["", "", "", "length"]
        frame = own[-1].frame
        assert (frame.position_start, frame.position_count, frame.last) == (2, 5, True)
        sequence = np.array([1, 2, 3, *token_ids], dtype=np.int32)
        assert frame.sequence_digest == sequence_digest(sequence)
        expected = reference_logits(engine, sequence)[range(2, 6), token_ids]
        np.testing.assert_allclose(decode(frame.target_logits), expected, rtol=1e-4, atol=1e-3)
    assert (usage.students[0].generated_tokens, usage.students[0].rows) == (8, 10)


async def test_writing_that_is_refused(connect):
    request = pb.WriteRationalesRequest(request_id="w", prompt_token_ids=encode(tokens(3)), max_new_tokens=0)
    async with serving(fake_teacher(None, FakeGenerationEngine())) as server:
        (response,) = [response async for response in connect(server.address).WriteRationales(request)]
    assert (response.request_id, response.refusal.field) == ("w", "max_new_tokens")


async def test_usage_by_student(connect):
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        stub = connect(server.address)
        for student, count in (("b-student", 2), ("a-student", 1)):
            requests = [topk(str(i), tokens(10), score_start=4) for i in range(count)]
            call = stub.ScoreSequences(iter(requests), metadata=[(STUDENT_METADATA_KEY, student)])
            answers = await answers_of(call)
        usage = await stub.GetTeacherUsage(pb.GetTeacherUsageRequest())
        info = await stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
        (frame,) = [response.frame for response in answers["0"]]
    assert [student.student_id for student in usage.students] == ["a-student", "b-student"]
    assert [student.sequences for student in usage.students] == [1, 2]
    assert [student.tokens for student in usage.students] == [10, 20]
    assert [student.rows for student in usage.students] == [6, 12]
    assert usage.students[0].bytes == frame.ByteSize()
    assert usage.instance_id == server.servicer.instance_id
    assert info.model_name == "fake"


@pytest.mark.parametrize("student", ["../etc", "A", "x" * 65])
async def test_a_student_with_a_bad_name_is_refused(connect, student):
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        call = connect(server.address).GetTeacherInfo(
            pb.GetTeacherInfoRequest(), metadata=[(STUDENT_METADATA_KEY, student)]
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert STUDENT_METADATA_KEY in refused.value.details()


async def test_a_role_that_is_not_played(connect):
    async with serving(fake_teacher(None, FakeGenerationEngine())) as server:
        stub = connect(server.address)
        for call in (stub.ScoreSequences(iter([])), stub.GetUnembedding(pb.GetUnembeddingRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "--roles score" in refused.value.details()


async def _health(stub) -> str:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=server_module.SERVICE_NAME))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_nothing_is_served_before_the_teacher_is_loaded(connect):
    from tutelage.teacher_server.config import TeacherConfig

    server = server_module.TeacherServer(TeacherConfig(model="fake", port=0))
    await server.start()
    health = connect(server.address, health_pb2_grpc.HealthStub)
    stub = connect(server.address)
    assert await _health(health) == "NOT_SERVING"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "loading" in refused.value.details()
    await server.open(fake_teacher(FakeScoringEngine()))
    assert await _health(health) == "SERVING"
    assert (await stub.GetTeacherInfo(pb.GetTeacherInfoRequest())).model_name == "fake"
    await server.stop(0)


async def test_draining_finishes_what_is_in_flight_and_takes_nothing_new(connect):
    engine = FakeScoringEngine(seconds=0.5)
    async with serving(fake_teacher(engine)) as server:
        stub, health = connect(server.address), connect(server.address, health_pb2_grpc.HealthStub)
        call = stub.ScoreSequences()
        await call.write(topk("in-flight", tokens(5)))
        await _until(lambda: engine.started == 1)
        watching = health.Watch(health_pb2.HealthCheckRequest(service=""))  # must not hold up the end
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop(10))
        response = await call.read()
        assert (response.request_id, response.WhichOneof("outcome")) == ("in-flight", "frame")
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(stopping, 5)


async def test_what_does_not_finish_while_draining_is_cancelled(connect):
    engine = FakeScoringEngine(seconds=3600)
    async with serving(fake_teacher(engine)) as server:
        call = connect(server.address).ScoreSequences(iter([topk("endless", tokens(5))]))
        await _until(lambda: engine.started == 1)
        await asyncio.wait_for(server.stop(0.3), 5)
        await _until(lambda: engine.cancelled == 1)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call.read()


@pytest.fixture
async def serve(tmp_path):
    """Runs `serve` with a fake teacher as a task; returns its address once it is serving."""
    from tutelage.teacher_server.config import TeacherConfig

    started = []

    async def start(teacher):
        file = tmp_path / "address"
        config = TeacherConfig(model="fake", port=0, address_file=file)
        started.append(asyncio.create_task(server_module.serve(config, lambda *_: teacher)))
        await _until(lambda: file.exists() or started[-1].done())
        return started[-1], file.read_text()

    yield start
    for running in started:
        if not running.done():
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait_for(running, 10)
    gc.unfreeze()  # of this process, which does more than serve


async def test_a_full_garbage_collection_looks_at_little(serve):
    await serve(fake_teacher(FakeScoringEngine()))
    assert len(gc.get_objects()) < gc.get_freeze_count() / 10


async def test_the_death_of_an_engine_ends_the_server_within_two_seconds(connect, serve):
    engine = FakeScoringEngine()
    running, address = await serve(fake_teacher(engine, FakeGenerationEngine()))
    health = connect(address, health_pb2_grpc.HealthStub)
    assert await _health(health) == "SERVING"
    watching = health.Watch(health_pb2.HealthCheckRequest(service=server_module.SERVICE_NAME))
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    engine.dead = True
    red = await asyncio.wait_for(watching.read(), 2)
    assert red.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(TutelageError, match="an engine died"):
        await asyncio.wait_for(running, 2)


async def test_the_death_of_the_generating_engine_leaves_scoring_alone(connect, serve, caplog):
    generating = FakeGenerationEngine()
    running, address = await serve(fake_teacher(FakeScoringEngine(), generating))
    stub, health = connect(address), connect(address, health_pb2_grpc.HealthStub)
    generating.dead = True
    await _until(lambda: "the generating engine died" in caplog.text)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.WriteRationales(
            pb.WriteRationalesRequest(request_id="w", prompt_token_ids=encode(tokens(3)), max_new_tokens=2)
        ).read()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    (answer,) = (await answers_of(stub.ScoreSequences(iter([topk("s", tokens(5))]))))["s"]
    assert answer.WhichOneof("outcome") == "frame"
    assert await _health(health) == "SERVING"
    assert not running.done()
    assert caplog.text.count("the generating engine died") == 1


async def test_the_death_of_the_only_engine_ends_the_server(serve):
    generating = FakeGenerationEngine()
    running, _ = await serve(fake_teacher(None, generating))
    generating.dead = True
    with pytest.raises(TutelageError, match="an engine died"):
        await asyncio.wait_for(running, 5)


async def test_the_noise_floor_is_measured_before_serving(connect, serve):
    class Batched(FakeScoringEngine):
        """Adds a little in batches: the second time that it is given the same tokens."""

        async def hidden_states(self, token_ids, first=0, salt=""):
            states = await super().hidden_states(token_ids, first, salt)
            return replace(states, states_RD=states.states_RD * (1.02 if self.started > 2 else 1))

    running, address = await serve(fake_teacher(Batched()))
    info = await connect(address).GetTeacherInfo(pb.GetTeacherInfoRequest())
    assert info.noise_floor.positions == 5
    assert 0 < info.noise_floor.mean_kl < info.noise_floor.max_kl < 1
    assert not running.done()


async def test_a_teacher_with_broken_weights_is_not_served():
    from tutelage.teacher_server.config import TeacherConfig

    engine = FakeScoringEngine()
    engine.embeddings[1] = torch.nan
    config = TeacherConfig(model="fake", port=0)
    with pytest.raises(TutelageError, match="not finite"):
        await server_module.serve(config, lambda *_: fake_teacher(engine))


async def test_a_signal_ends_a_server_that_is_still_loading():
    from tutelage.teacher_server.config import TeacherConfig

    loading, released = threading.Event(), threading.Event()

    def load(*_):
        loading.set()
        released.wait(30)
        return fake_teacher(FakeScoringEngine())

    config = TeacherConfig(model="fake", port=0)
    running = asyncio.create_task(server_module.serve(config, load))
    await _until(loading.is_set)
    signal.raise_signal(signal.SIGINT)
    await asyncio.wait_for(running, 5)
    released.set()


async def test_reflection_only_on_request(connect):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with serving(fake_teacher(FakeScoringEngine()), reflection=True) as server:
        stub = connect(server.address, reflection_pb2_grpc.ServerReflectionStub)
        (answer,) = [response async for response in stub.ServerReflectionInfo(iter([request]))]
        assert server_module.SERVICE_NAME in {service.name for service in answer.list_services_response.service}
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        stub = connect(server.address, reflection_pb2_grpc.ServerReflectionStub)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ServerReflectionInfo(iter([request])).read()
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_info_and_usage_as_commands(capsys):
    from tutelage.teacher_server.cli import main

    async with serving(fake_teacher(FakeScoringEngine())) as server:
        for command in ("info", "usage"):
            assert await asyncio.to_thread(main, [command, "--address", server.address]) == 0
            assert await asyncio.to_thread(main, [command, "--address", server.address, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "topk, candidates, hidden" in printed
    answers = printed[printed.index("{") :]
    assert json.loads(answers[: answers.index("\n}") + 2])["vocabulary_size"] == VOCABULARY_SIZE


async def test_several_servers_are_shown_with_their_addresses(capsys):
    from tutelage.teacher_server.cli import main

    async with serving(fake_teacher(FakeScoringEngine())) as one, serving(fake_teacher(FakeScoringEngine())) as other:
        addresses = [one.address, other.address, "127.0.0.1:1"]
        for command in ("info", "usage"):
            assert await asyncio.to_thread(main, [command, "--address", *addresses[:2]]) == 0
            assert await asyncio.to_thread(main, [command, "--json", "--address", *addresses]) == 3
        assert await asyncio.to_thread(main, ["top", "--looks", "1", "--address", *addresses]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["address"] for line in lines] == addresses * 2
    assert [line.get("instance_id") for line in lines[-3:-1]] == [one.servicer.instance_id, other.servicer.instance_id]
    assert "no teacher answers at 127.0.0.1:1" in lines[-1]["error"]
    top = printed[printed.rindex("}") :]
    assert all(address in top for address in addresses)
    assert "no teacher answers" in top


async def _until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
