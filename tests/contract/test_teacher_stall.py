"""A student that stops reading loses its stream after a while, and what the stream held is free at once."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import numpy as np
import pytest

from fake_teacher import FakeGenerationEngine, FakeScoringEngine, fake_teacher, serving
from tutelage.errors import Unreachable
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import CHANNEL_OPTIONS, STUDENT_METADATA_KEY, error_of_rpc
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

TOKENS = np.arange(2000, dtype=np.int32) % 97
LOOK_SECONDS = 0.02
HIDDEN = pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN)


def requests(count: int):
    return [pb.ScoreSequencesRequest(request_id=str(i), token_ids=encode(TOKENS), signal=HIDDEN) for i in range(count)]


async def until_true(condition, seconds: float) -> int:
    """Looks at it every 20 ms; gives how often it was false. A machine that is busy elsewhere looks less often."""
    started, looks = time.monotonic(), 0
    while not condition():
        assert time.monotonic() - started < seconds
        await asyncio.sleep(LOOK_SECONDS)
        looks += 1
    return looks


async def until_the_end(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_stream_that_is_not_read_ends_and_frees_what_it_held():
    engine = FakeScoringEngine()
    async with (
        serving(fake_teacher(engine), stall_seconds=0.5) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub = pb_grpc.TeacherServiceStub(channel)
        asleep = stub.ScoreSequences(iter(requests(300)), metadata=[(STUDENT_METADATA_KEY, "asleep")])
        await asleep.read()
        usage = server.servicer.usage

        def streams(student: str) -> int:
            return {each.student_id: each.open_streams for each in usage().students}.get(student, 0)

        await until_true(lambda: engine.started > 20, 30)
        assert await until_true(lambda: streams("asleep") == 0, 30) * LOOK_SECONDS < 2
        started = engine.started
        awake = stub.ScoreSequences(iter(requests(20)), metadata=[(STUDENT_METADATA_KEY, "awake")])
        answered = {response.request_id async for response in awake if response.frame.last}
        assert len(answered) == 20
        assert engine.started == started + 20
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await until_the_end(asleep)
        # A trainer that was only stopped for a while asks again.
        assert isinstance(error_of_rpc(failure.value, server.address, "teacher"), Unreachable)


async def test_a_student_that_reads_slowly_but_steadily_keeps_its_stream():
    async with (
        serving(fake_teacher(FakeScoringEngine()), stall_seconds=0.5) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        call = pb_grpc.TeacherServiceStub(channel).ScoreSequences(iter(requests(40)))
        answered = 0
        async for _ in call:
            answered += 1
            await asyncio.sleep(0.03)
        assert answered == 40


async def test_writing_ends_too_when_nobody_reads():
    async with (
        serving(fake_teacher(FakeScoringEngine(), FakeGenerationEngine()), stall_seconds=0.3) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        request = pb.WriteRationalesRequest(
            request_id="w", prompt_token_ids=encode(TOKENS[:1]), max_new_tokens=1900, samples=4, temperature=1.0
        )
        call = pb_grpc.TeacherServiceStub(channel).WriteRationales(request)
        await call.read()
        await until_true(lambda: not any(each.open_streams for each in server.servicer.usage().students), 5)
