"""What one student paid for, the next gets for nothing: the store and the shared computation, through gRPC."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc.aio
import numpy as np
import pytest

from fake_teacher import VOCABULARY_SIZE, FakeScoringEngine, fake_teacher, serving
from tutelage.rpc.codec import decode, encode
from tutelage.rpc.transport import CHANNEL_OPTIONS, STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, VOCABULARY_SIZE, 20 + i % 30).astype(np.int32) for i in range(500)]


def topk(k: int, *temperatures: float) -> pb.SignalSpec:
    return pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=k, temperatures=temperatures)


OBJECTIVES = {
    "forward": topk(64, 1.0),
    "hot": topk(64, 2.0, 5.0),
    "narrow": topk(8, 1.0),
    "noisy": pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN),
    "reverse": pb.SignalSpec(kind=pb.SIGNAL_KIND_CANDIDATES, temperatures=[1.0]),
    "again": topk(64, 1.0),
}


def request(number: int, spec: pb.SignalSpec) -> pb.ScoreSequencesRequest:
    ids, own = SEQUENCES[number], pb.SignalSpec()
    own.CopyFrom(spec)
    if spec.kind == pb.SIGNAL_KIND_CANDIDATES:
        own.candidate_ids.CopyFrom(encode(np.stack([ids, (ids + 1) % VOCABULARY_SIZE], axis=1)))
    return pb.ScoreSequencesRequest(request_id=str(number), token_ids=encode(ids), signal=own)


async def score(address: str, student: str, spec: pb.SignalSpec, numbers=range(100)):
    """Frames by request id."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = pb_grpc.TeacherServiceStub(channel).ScoreSequences(
            (request(number, spec) for number in numbers), metadata=[(STUDENT_METADATA_KEY, student)]
        )
        return {response.request_id: response.frame async for response in call}


async def all_students(address: str, numbers=range(100)):
    answers = await asyncio.gather(*(score(address, student, spec, numbers) for student, spec in OBJECTIVES.items()))
    return dict(zip(OBJECTIVES, answers, strict=True))


@pytest.fixture
def config(tmp_path):
    return {"store": {"path": str(tmp_path), "bytes": 10**8}}


class Noisy(FakeScoringEngine):
    """Never gives the same numbers twice, as an engine in other batches does; a little more so."""

    async def hidden_states(self, token_ids, first=0, salt=""):
        states = await super().hidden_states(token_ids, first, salt)
        return replace(states, states_RD=states.states_RD * (1 + self.started / 100))


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.long)])
async def test_six_students_cost_the_engine_passes_of_one(config, count):
    engine = Noisy(seconds=0.005)
    async with serving(fake_teacher(engine, config=config)) as server:
        answers = await all_students(server.address, range(count))
        usage = server.servicer.usage()
    assert engine.started == usage.engine_passes == count
    assert sum(student.store_hits for student in usage.students) == 5 * count
    assert sum(student.sequences for student in usage.students) == 6 * count
    assert usage.stored_bytes > 0
    assert answers["forward"] == answers["again"]
    assert all(len(frames) == count for frames in answers.values())
    for number in map(str, range(count)):  # whatever was asked, it is about the same states
        wide, narrow, hot = (answers[student][number] for student in ("forward", "narrow", "hot"))
        assert np.array_equal(decode(wide.ids)[:, :8], decode(narrow.ids))
        assert np.array_equal(decode(wide.logits)[:, :8], decode(narrow.logits))
        assert wide.logits == hot.logits
        assert wide.logsumexp == narrow.logsumexp


async def test_a_teacher_that_is_started_again_answers_from_the_store_with_the_same_bits(config):
    first = fake_teacher(Noisy(), config=config)
    async with serving(first) as server:
        before = await all_students(server.address)
    first.shutdown()
    engine = Noisy()
    second = fake_teacher(engine, config=config)
    async with serving(second) as server:
        assert await all_students(server.address) == before
    assert engine.started == 0


async def test_a_shared_computation_outlives_the_student_that_began_it(config):
    engine = FakeScoringEngine(seconds=0.3)
    async with serving(fake_teacher(engine, config=config)) as server:
        first = asyncio.create_task(score(server.address, "first", topk(8, 1.0), [0]))
        while not engine.started:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(score(server.address, "second", topk(8, 1.0), [0]))
        await asyncio.sleep(0.1)
        first.cancel()
        assert (await second).keys() == {"0"}
        assert (engine.started, engine.cancelled) == (1, 0)
        third = asyncio.create_task(score(server.address, "third", topk(8, 1.0), [1]))
        while engine.started < 2:
            await asyncio.sleep(0.01)
        third.cancel()
        while not engine.cancelled:
            await asyncio.sleep(0.01)
        assert (await score(server.address, "fourth", topk(8, 1.0), [1])).keys() == {"1"}


async def test_a_full_disk_costs_engine_passes_and_no_answers(config, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tutelage.teacher_server.signals.store.write_durably", full)
    engine = FakeScoringEngine()
    async with serving(fake_teacher(engine, config=config)) as server:
        for _ in range(2):
            assert len(await score(server.address, "ann", topk(8, 1.0), range(5))) == 5
    assert engine.started == 10
    assert "No space left" in caplog.text
