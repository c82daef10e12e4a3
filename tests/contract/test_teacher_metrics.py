"""The same numbers for Prometheus and in a terminal."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import grpc.aio
import numpy as np
import pytest
from prometheus_client import Gauge

from fake_teacher import FakeGenerationEngine, FakeScoringEngine, fake_teacher, serving
from tutelage.errors import ConfigurationError
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server import cli
from tutelage.teacher_server.cli import main
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.metrics import EngineMetrics
from tutelage.teacher_server.server.server import TeacherServer


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
    began = time.monotonic()
    async with serving(fake_teacher(FakeScoringEngine(seconds=0.05)), metrics_port=port) as server:
        await score(server.address, 4)
        usage, text = server.servicer.usage(), await asyncio.to_thread(metrics, port)
    (ann,) = usage.students
    assert ann.service_seconds >= 4 * 0.05
    assert 0 <= ann.queue_seconds < ann.service_seconds
    passed = time.monotonic() - began
    assert 0.05 <= usage.engine_busy_seconds < passed
    assert 0 < usage.head_busy_seconds < passed
    for name in ("engine_busy_seconds", "head_busy_seconds", "queue_seconds", "service_seconds"):
        assert f"tutelage_teacher_{name}_total" in text


async def test_queues_are_beside_their_limits_and_the_store_beside_its_room(port, tmp_path):
    config = {"max_waiting_requests": 7, "store": {"path": str(tmp_path / "store"), "bytes": 10**6}}
    async with serving(fake_teacher(FakeScoringEngine(), config=config), metrics_port=port, **config) as server:
        await score(server.address, 2)
        text = await asyncio.to_thread(metrics, port)
    said = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    values = {name.removeprefix("tutelage_teacher_"): float(value) for name, value in said.items()}
    assert values["serving"] == 1
    assert (values["waiting_sequences"], values["waiting_prompts"], values["max_waiting_requests"]) == (0, 0, 7)
    assert 0 < values["stored_bytes"] < values["max_stored_bytes"] == 10**6
    assert 0 < values['disk_free_bytes{folder="store"}'] < values['disk_size_bytes{folder="store"}']


async def test_one_that_loads_or_drains_does_not_serve(port):
    server = TeacherServer(TeacherConfig.model_validate({"model": "fake", "port": 0, "metrics_port": port}))
    await server.start()
    assert "tutelage_teacher_serving 0.0" in await asyncio.to_thread(metrics, port)
    await server.open(fake_teacher(FakeScoringEngine()))
    assert "tutelage_teacher_serving 1.0" in await asyncio.to_thread(metrics, port)
    await server.servicer.drain(0)
    assert "tutelage_teacher_serving 0.0" in await asyncio.to_thread(metrics, port)
    await server.stop(0)


def asked_as_prometheus_asks(port: int) -> str:
    accepted = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accepted})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()


async def test_what_the_engines_count_keeps_vllms_names_and_stands_there_once(port):
    """In OpenMetrics prometheus_client made `vllm_num_requests_running` of it."""
    engines = [EngineMetrics(role, 0) for role in ("score", "write")]
    for running, engine in enumerate(engines):
        Gauge("vllm:num_requests_running", "Running.", ["engine"], registry=engine._registry).labels("0").set(running)
    scoring, writing = FakeScoringEngine(), FakeGenerationEngine()
    scoring.metrics, writing.metrics = engines[0].collect, engines[1].collect
    async with serving(fake_teacher(scoring, writing), metrics_port=port):
        lines = (await asyncio.to_thread(asked_as_prometheus_asks, port)).splitlines()
    assert 'vllm:num_requests_running{engine="0",replica="0",role="score"} 0.0' in lines
    assert 'vllm:num_requests_running{engine="0",replica="0",role="write"} 1.0' in lines
    assert lines.count("# TYPE vllm:num_requests_running gauge") == 1


async def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="metrics_port"):
            async with serving(fake_teacher(FakeScoringEngine()), metrics_port=taken.getsockname()[1]):
                pass


async def test_top_shows_rates(capsys, monkeypatch):
    loop = asyncio.get_running_loop()
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        await score(server.address, 1)

        def work_meanwhile(seconds: float) -> None:
            if seconds:
                asyncio.run_coroutine_threadsafe(score(server.address, 7), loop).result(60)

        monkeypatch.setattr(cli, "time", SimpleNamespace(**vars(time) | {"sleep": work_meanwhile}))
        arguments = ["top", "--address", server.address, "--seconds", "1.0", "--looks", "2"]
        assert await asyncio.to_thread(main, arguments) == 0
    printed = capsys.readouterr().out
    assert "ann" in printed
    assert "7.0" in printed
