"""Many students of one teacher whose engine takes a fixed time: what `test_teacher_load.py` and the benchmark run.

The server runs in a process of its own: `python tests/teacher_load.py SECONDS_A_SEQUENCE MAX_WAITING`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import grpc.aio
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fake_teacher import VOCABULARY_SIZE, FakeScoringEngine, fake_head, fake_teacher, serving
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import CHANNEL_OPTIONS, STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.admission.validation import Scoring, Signal
from tutelage.teacher_server.model.teacher import Teacher
from tutelage.teacher_server.server.server import freeze_gc_heap
from tutelage.teacher_server.signals import frame_encoder as frames

TOKENS, K, SEQUENCES, WINDOW = 512, 64, 16, 8
IDS = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (SEQUENCES, TOKENS)).astype(np.int32)
SPEC = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=K, temperatures=[1.0])


@dataclass
class Load:
    """What students saw."""

    seconds: float = 0.0
    served: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    answer_seconds: list[float] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)
    retry_milliseconds: list[int] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)

    @property
    def a_second(self) -> float:
        return self.served.total() / self.seconds


@contextmanager
def server_process(seconds: float, max_waiting: int = 4096) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, __file__, str(seconds), str(max_waiting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.kill()


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))


class Students:
    """Students of one address, each on a channel of its own; every answer is compared, byte for byte."""

    def __init__(self, address: str) -> None:
        self._address, self.load = address, Load()
        engine, head = FakeScoringEngine(), fake_head()
        self._expected = [frames.frame(_scoring(ids), _states(engine, ids), head, index=0, start=0, end=TOKENS)
                          for ids in IDS]  # fmt: skip

    async def closed_loop(self, student_id: str, streams: int = 1) -> None:
        """Streams with WINDOW requests in flight each, until cancelled."""
        async with self._stub(student_id) as (stub, metadata):
            await asyncio.gather(*(self._stream(stub, metadata, student_id) for _ in range(streams)))

    async def open_loop(self, students: int, a_second: float) -> None:
        """New requests at a fixed rate whatever becomes of the earlier ones, until cancelled."""
        async with self._stub("any") as (stub, _), asyncio.TaskGroup() as calls:
            started = time.monotonic()
            for number in range(10**9):
                await asyncio.sleep(started + number / a_second - time.monotonic())
                calls.create_task(self.ask(stub, f"student-{number % students}", number))

    async def ask(self, stub: pb_grpc.TeacherServiceStub, student_id: str, number: int) -> None:
        """One request on a stream of its own."""
        started = time.monotonic()
        metadata = ((STUDENT_METADATA_KEY, student_id),)
        call = stub.ScoreSequences(iter([_request(number)]), metadata=metadata)
        async for response in call:
            self._count(student_id, response, started)

    async def watch_health(self) -> None:
        """Asks ten times a second, until cancelled."""
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                started = time.monotonic()
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                self.load.health_seconds.append(time.monotonic() - started)
                await asyncio.sleep(0.1)

    async def recovered_after(self) -> float:
        """Seconds until one more request is answered."""
        started = time.monotonic()
        async with self._stub("late") as (stub, _):
            while not self.load.served["late"]:
                await self.ask(stub, "late", 0)
        return time.monotonic() - started

    @asynccontextmanager
    async def _stub(self, student_id: str) -> AsyncIterator[tuple[pb_grpc.TeacherServiceStub, tuple]]:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            yield pb_grpc.TeacherServiceStub(channel), ((STUDENT_METADATA_KEY, student_id),)

    async def _stream(self, stub: pb_grpc.TeacherServiceStub, metadata: tuple, student_id: str) -> None:
        call = stub.ScoreSequences(metadata=metadata)
        for number in range(WINDOW):
            await call.write(_request(number))
        number = WINDOW
        while True:
            self._count(student_id, await call.read(), time.monotonic())
            await call.write(_request(number))
            number += 1

    def _count(self, student_id: str, response: pb.ScoreSequencesResponse, started: float) -> None:
        if response.HasField("refusal"):
            self.load.refusal_seconds.append(time.monotonic() - started)
            self.load.retry_milliseconds.append(response.refusal.retry_after_milliseconds)
            return
        self.load.served[student_id] += 1
        self.load.answer_seconds.append(time.monotonic() - started)
        self.load.wrong += response.frame != self._expected[int(response.request_id) % SEQUENCES]


async def for_seconds(
    students: Students, seconds: float, *work: Coroutine[object, object, None], warm_up: float = 0.5
) -> Load:
    """What students saw in a time, after a warm-up, while all this goes on."""
    async with asyncio.timeout(warm_up + seconds + 60), _going_on(work):
        await asyncio.sleep(warm_up)
        students.load = Load()
        started = time.monotonic()
        await asyncio.sleep(seconds)
        students.load.seconds = time.monotonic() - started
        return students.load


async def until(students: Students, enough: Callable[[Load], bool], *work: Coroutine[object, object, None]) -> Load:
    """What students saw until it was enough, while all this goes on; however slow the machine is."""
    async with asyncio.timeout(120), _going_on(work):
        while not enough(students.load):
            await asyncio.sleep(0.02)
        return students.load


@asynccontextmanager
async def _going_on(work: tuple[Coroutine[object, object, None], ...]) -> AsyncIterator[None]:
    """Ends with the block; work that ends earlier has failed, and fails it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()


def _request(number: int) -> pb.ScoreSequencesRequest:
    return pb.ScoreSequencesRequest(request_id=str(number), token_ids=encode(IDS[number % SEQUENCES]), signal=SPEC)


def _scoring(ids: np.ndarray) -> Scoring:
    return Scoring(ids, Signal(SPEC.kind, K, (1.0,), None), start=0, end=TOKENS)


def _states(engine: FakeScoringEngine, ids: np.ndarray):
    return engine.embeddings[ids.tolist()].cumsum(0).bfloat16()


def fixed_latency_teacher(seconds: float, max_waiting: int = 4096) -> Teacher:
    """A teacher that computes one sequence after the other, each in this time."""
    engine = FakeScoringEngine(seconds=seconds, parallel=1)
    return fake_teacher(engine, config={"max_waiting_requests": max_waiting}, frame_bytes=256 * 2**10)


async def _serve(seconds: float, max_waiting: int) -> None:
    async with serving(fixed_latency_teacher(seconds, max_waiting)) as server:
        freeze_gc_heap()  # as `serve` does
        print(server.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    asyncio.run(_serve(float(sys.argv[1]), int(sys.argv[2])))
