"""Kill -9 of a real teacher that students learn from: its streams break at once, no engine outlives it, and when it is
back, with two engines, its students finish as if nothing had been. Then one of its engines is killed.

The forms that run always: test_teacher_kill_mid_stream.py with a double of the engine, and test_teacher_server.py.
"""

from __future__ import annotations

import json
import os
import signal
import time

import grpc
import numpy as np
import psutil
import pytest

from teacher_process import TeacherProcess, assert_it_ends_with_its_engine, end, gone, start
from trainer_cohorts import assert_finished, free_port, running, steps_done, wait_until, write_cohort
from tutelage.rpc.codec import encode
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

STEPS = 150
OPTIONS = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(2**28))


def _endless():
    signal_spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=8, temperatures=[1.0])
    number = 0
    while True:
        ids = encode(np.full(500, number % 500, dtype=np.int32))
        yield pb.ScoreSequencesRequest(request_id=str(number), token_ids=ids, signal=signal_spec)
        number += 1


def _kill_server(teacher: TeacherProcess) -> None:
    engines = teacher.engines
    assert engines
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_teacher_that_comes_back_costs_only_time_and_a_killed_engine_ends_it(tiny_model, tmp_path):
    log, port = tmp_path / "log", free_port()
    folders = [tmp_path / "run/students" / student for student in ("ann", "bob")]
    cohort = write_cohort(tmp_path, tiny_model, f"127.0.0.1:{port}", STEPS)
    teachers = []
    try:
        with running(["train", "--config", str(cohort)], log) as train:
            teachers.append(start(tmp_path / "first", tiny_model, *OPTIONS, port=port))
            wait_until(lambda: min(map(steps_done, folders)) >= 8, 120, log, train)
            _kill_server(teachers[0])
            assert max(map(steps_done, folders)) < STEPS
            two_engines = ("--score-engines", "2")
            teachers.append(start(tmp_path / "second", tiny_model, *OPTIONS, *two_engines, port=port))
            assert train.wait(150) == 0, log.read_text()[-3000:]
        assert_finished(tmp_path, STEPS)
        waited = [
            sum(
                json.loads(line).get("seconds/waiting", 0)
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            )
            for folder in folders
        ]
        assert min(waited) > 1
        assert_it_ends_with_its_engine(teachers[1])
    finally:
        for teacher in teachers:
            end(teacher.process)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_teacher_that_is_told_to_stop_while_it_loads_ends_at_once(number, tiny_model, tmp_path):
    with running(["teacher", "serve", str(tiny_model), "--port", "0"], log := tmp_path / "log") as teacher:
        wait_until(lambda: "starting vLLM" in log.read_text(), 200, log, teacher)
        processes = psutil.Process(teacher.pid).children(recursive=True)
        os.killpg(teacher.pid, number)
        assert teacher.wait(20) == 0, log.read_text()[-3000:]
        assert gone(processes, seconds=10)
    assert "Traceback" not in log.read_text()
