"""The same numbers for Prometheus and in a terminal."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request

import grpc.aio
import numpy as np
import pytest

from fake_teacher import FakeScoringEngine, fake_teacher, serving
from tutelage.errors import ConfigurationError
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.cli import main


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def score(address: str, sequences: int) -> None:
    signal = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=3, temperatures=[1.0])
    async with grpc.aio.insecure_channel(address) as channel:
        ids = [encode(np.arange(first, first + 10, dtype=np.int32)) for first in range(sequences)]
        requests = (
            pb.ScoreSequencesRequest(request_id=str(number), token_ids=each, signal=signal)
            for number, each in enumerate(ids)
        )
        metadata = [(STUDENT_METADATA_KEY, "ann")]
        async for _ in pb_grpc.TeacherServiceStub(channel).ScoreSequences(requests, metadata=metadata):
            pass


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


async def test_metrics_are_what_was_done(port):
    async with serving(fake_teacher(FakeScoringEngine()), metrics_port=port) as server:
        await score(server.address, 4)
        text = await asyncio.to_thread(metrics, port)
    assert 'tutelage_teacher_sequences_total{student="ann"} 4.0' in text
    assert 'tutelage_teacher_rows_total{student="ann"} 40.0' in text
    assert "tutelage_teacher_engine_passes_total 4.0" in text
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(metrics, port)


async def test_time_is_counted_by_student_and_for_engine_and_head(port):
    async with serving(fake_teacher(FakeScoringEngine(seconds=0.05)), metrics_port=port) as server:
        await score(server.address, 4)
        usage, text = server.servicer.usage(), await asyncio.to_thread(metrics, port)
    (ann,) = usage.students
    assert ann.service_seconds >= 4 * 0.05
    assert 0 <= ann.queue_seconds < ann.service_seconds
    assert 0.05 <= usage.engine_busy_seconds < 2
    assert 0 < usage.head_busy_seconds < 2
    for name in ("engine_busy_seconds", "head_busy_seconds", "queue_seconds", "service_seconds"):
        assert f"tutelage_teacher_{name}_total" in text


async def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="metrics_port"):
            async with serving(fake_teacher(FakeScoringEngine()), metrics_port=taken.getsockname()[1]):
                pass


async def test_top_shows_rates(capsys):
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        await score(server.address, 1)
        arguments = ["top", "--address", server.address, "--seconds", "1.0", "--looks", "2"]
        shown = asyncio.create_task(asyncio.to_thread(main, arguments))
        await asyncio.sleep(0.5)
        await score(server.address, 7)
        assert await shown == 0
    printed = capsys.readouterr().out
    assert "ann" in printed
    assert "7.0" in printed
