"""Kill -9, at either end: no engine outlives its server, and no server outlives its engine."""

from __future__ import annotations

import os
import signal
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from teacher_process import end, gone, start
from tutelage.codec import encode
from tutelage.teacher.v1 import teacher_pb2 as pb
from tutelage.teacher.v1 import teacher_pb2_grpc as pb_grpc


@pytest.fixture
def teacher(tiny_model, tmp_path):
    teacher = start(tmp_path, tiny_model, "--max-sequence-tokens", "512", "--kv-cache-gib", "0.25")
    yield teacher
    end(teacher.process)


def _endless():
    signal_spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=8, temperatures=[1.0])
    number = 0
    while True:
        ids = encode(np.full(500, number % 500, dtype=np.int32))
        yield pb.ScoreSequencesRequest(request_id=str(number), token_ids=ids, signal=signal_spec)
        number += 1


def test_a_killed_server_leaves_no_engine(teacher):
    engines = teacher.engines
    assert len(engines) >= 2
    with grpc.insecure_channel(teacher.address) as channel:
        answers = pb_grpc.TeacherServiceStub(channel).ScoreSequences(_endless(), timeout=60)
        for _ in range(20):
            next(answers)
        os.kill(teacher.process.pid, signal.SIGKILL)  # the server alone, not its group
        killed = time.monotonic()
        with pytest.raises(grpc.RpcError) as broken:
            for _ in answers:
                pass
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - killed < 1
    assert gone(engines, seconds=10)


def test_a_killed_engine_ends_the_server_and_short_sequences_do_not(teacher):
    signal_spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN)
    short = [
        pb.ScoreSequencesRequest(request_id=str(n), token_ids=encode(np.arange(n, dtype=np.int32)), signal=signal_spec)
        for n in range(1, 9)
    ]
    with grpc.insecure_channel(teacher.address) as channel:  # one at a time: each length is a batch
        for request in short:
            (answer,) = pb_grpc.TeacherServiceStub(channel).ScoreSequences(iter([request]), timeout=60)
            assert answer.frame.position_count == int(request.request_id)
    with grpc.insecure_channel(teacher.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        worker = teacher.engines[-1]
        worker.kill()
        killed = time.monotonic()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert time.monotonic() - killed < 2
        assert teacher.process.wait(30) not in (0, None)
    assert "an engine died" in teacher.log.read_text(errors="replace")
