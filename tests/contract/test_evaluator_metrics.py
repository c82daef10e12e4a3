"""What Prometheus reads of an evaluator: its queue, what runs, the newest scores."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.evaluator.config import ServeConfig
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.service.metrics import EvaluatorCollector
from tutelage.evaluator.service.queue import Entry, Score
from tutelage.evaluator.service.server import Service
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc

GKD = {"run": "r1", "student": "gkd"}
ACCURACY = {**GKD, "task": "arithmetic", "protocol": "loglik", "metric": "acc"}


def scraped(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"tutelage_evaluator_{name}", frozenset(labels.items())


async def test_the_queue_what_runs_and_the_scores_are_scraped(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(port=0, frames=tmp_path / "frames", queue=tmp_path / "queue", prompt="chat", metrics_port=port)
    service = Service(config, engines=lambda _checkpoint: EchoEngine(delay=0.2))
    await service.start()
    task = pb.TaskRequest(task="arithmetic", protocol="loglik", limit=8)
    labels = pb.EvaluationLabels(run="r1", student="gkd", step=5)
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stub = pb_grpc.EvaluatorServiceStub(channel)
        for name in ("first", "second"):
            asked = pb.SubmitEvaluationRequest(
                evaluation_id=name, checkpoint=checkpoint, labels=labels, tasks=[task], seed=0 if name == "first" else 1
            )
            await stub.SubmitEvaluation(asked)
        async for answer in stub.WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id="first")):
            if answer.status.items_done:
                break
        during = await asyncio.to_thread(scraped, port)
        assert during[of("serving")] == 1
        assert during[of("evaluations", state="running")] == 1
        assert during[of("evaluations", state="queued")] == 1
        assert (during[of("done_items", **GKD)], during[of("all_items", **GKD)]) == (4, 8)
        assert during[of("items_per_second", **GKD)] > 0
        assert 0 < during[of("disk_free_bytes", folder="queue")] < during[of("disk_size_bytes", folder="queue")]
        await stub.CancelEvaluation(pb.CancelEvaluationRequest(evaluation_id="second"))
        async for answer in stub.WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id="first")):
            (score,) = answer.status.scores or [None]
        after = await asyncio.to_thread(scraped, port)
    assert after[of("score", **ACCURACY)] == score.score
    assert after[of("scored_step", **ACCURACY)] == 5
    assert after[of("evaluations", state="done")] == 1
    assert after[of("evaluations", state="cancelled")] == 1
    assert of("done_items", **GKD) not in after  # nothing runs
    await service.stop()
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(scraped, port)


def test_a_students_score_is_that_of_its_latest_step_whatever_came_in_last() -> None:
    def entry(number: int, step: int, value: float, **fields: object) -> Entry:
        labels = Labels("r1", "gkd", step=step)
        evaluation = Evaluation(f"e{number}", Path("x"), labels, (TaskRequest("arithmetic", "loglik"),))
        return replace(
            Entry(number, evaluation, "done", scores=(Score("arithmetic", "loglik", "acc", value, 0.1, 8),)), **fields
        )

    entries = [
        entry(1, 10, 0.5),
        entry(2, 30, 0.75),
        entry(3, 20, 0.6),
        entry(4, 30, 0.8),
        entry(5, 40, 0.9, scores=()),
    ]
    collector = EvaluatorCollector(lambda: entries, lambda: False, {"frames": Path("/not there")})
    samples = {(s.name, s.value) for family in collector.collect() for s in family.samples}
    assert ("tutelage_evaluator_score", 0.8) in samples
    assert ("tutelage_evaluator_scored_step", 30) in samples
    assert ("tutelage_evaluator_serving", 0) in samples
    assert not [name for name, _ in samples if "disk" in name]
