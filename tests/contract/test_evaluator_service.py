"""The evaluator's contract over a real connection, with a made-up engine behind it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.errors import ConfigurationError, DataError, NotFound
from tutelage.evaluator.cli import main
from tutelage.evaluator.config import ServeConfig
from tutelage.evaluator.report.run_data import with_roles
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.service import worker
from tutelage.evaluator.service.server import SERVICE_NAME, Service
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@asynccontextmanager
async def serving(
    folder: Path, *, delay: float = 0.0, workers: int = 1, max_tokens: int = 4096
) -> AsyncIterator[tuple[grpc.aio.Channel, Service]]:
    config = ServeConfig(
        port=0,
        frames=folder / "frames",
        queue=folder / "queue",
        prompt="chat",
        max_new_tokens=8,
        batch_size=4,
        workers=workers,
    )
    service = Service(config, engines=lambda _checkpoint: EchoEngine(delay=delay, max_tokens=max_tokens))
    await service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=CHANNEL_OPTIONS) as channel:
        try:
            yield channel, service
        finally:
            await service.stop()


def request(checkpoint: Path, name: str = "first", **fields: object) -> pb.SubmitEvaluationRequest:
    labels = pb.EvaluationLabels(run="r1", student="gkd", teacher="big", temperature=2.0, step=5)
    tasks = [
        pb.TaskRequest(task="arithmetic", protocol="paper", limit=10),
        pb.TaskRequest(task="arithmetic", protocol="loglik", limit=6),
    ]
    content = {"evaluation_id": name, "checkpoint": str(checkpoint), "labels": labels, "tasks": tasks, **fields}
    return pb.SubmitEvaluationRequest(**content)


async def watched(stub: pb_grpc.EvaluatorServiceStub, name: str) -> list[pb.EvaluationStatus]:
    call = stub.WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id=name))
    return [response.status async for response in call]


async def test_work_is_submitted_watched_and_listed(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path, delay=0.3) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        submitted = await stub.SubmitEvaluation(request(checkpoint))
        assert submitted.evaluation_id == "first"
        statuses = await watched(stub, "first")
        assert statuses[-1].state == pb.EVALUATION_STATE_DONE
        assert (statuses[-1].items_done, statuses[-1].items_total, statuses[-1].items_failed) == (16, 16, 0)
        assert statuses[-1].seconds_left == 0
        between = [one for one in statuses if 0 < one.items_done < 16]
        assert between
        assert all(one.items_per_second > 0 and one.seconds_left > 0 for one in between)
        scores = {(one.task, one.protocol): one for one in statuses[-1].scores}
        assert scores["arithmetic", "loglik"].metric == "acc"
        assert scores["arithmetic", "loglik"].items == 6
        listed = await stub.ListEvaluations(pb.ListEvaluationsRequest())
        assert [one.evaluation_id for one in listed.evaluations] == ["first"]
        assert listed.evaluations[0].labels == request(checkpoint).labels
        assert not (await stub.ListEvaluations(pb.ListEvaluationsRequest(run="another"))).evaluations
    assert len(read(tmp_path / "frames").collect()) == 16


async def test_the_same_again_is_the_same_and_another_is_a_conflict(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        await stub.SubmitEvaluation(request(checkpoint))
        await watched(stub, "first")
        again = await stub.SubmitEvaluation(request(checkpoint))
        assert again.state == pb.EVALUATION_STATE_DONE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SubmitEvaluation(request(checkpoint, seed=1))
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"evaluation_id": "../up"}, grpc.StatusCode.INVALID_ARGUMENT, "is not an id"),
        ({"tasks": []}, grpc.StatusCode.INVALID_ARGUMENT, "no task"),
        ({"tasks": [pb.TaskRequest(task="gsm9k", protocol="paper")]}, grpc.StatusCode.NOT_FOUND, "choose from"),
        ({"tasks": [pb.TaskRequest(task="gsm8k", protocol="loglik")]}, grpc.StatusCode.INVALID_ARGUMENT, "protocol"),
        ({"labels": pb.EvaluationLabels(run="/")}, grpc.StatusCode.INVALID_ARGUMENT, "is not a name"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    fields: dict[str, object], status: grpc.StatusCode, reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SubmitEvaluation(request(checkpoint, **fields))
        assert caught.value.code() == status
        assert reason in caught.value.details()
        assert not (await stub.ListEvaluations(pb.ListEvaluationsRequest())).evaluations
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watched(stub, "nobody")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_one_that_fails_says_why_and_the_next_one_runs(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        await stub.SubmitEvaluation(request(tmp_path / "nowhere", "lost"))
        await stub.SubmitEvaluation(request(checkpoint, "found"))
        lost = (await watched(stub, "lost"))[-1]
        assert lost.state == pb.EVALUATION_STATE_FAILED
        assert "nowhere is no folder" in lost.error
        assert (await watched(stub, "found"))[-1].state == pb.EVALUATION_STATE_DONE


async def test_what_could_not_be_scored_has_failed_and_leaves_no_links(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", manifest=True)
    async with serving(tmp_path, max_tokens=10) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        tasks = [pb.TaskRequest(task="arithmetic", protocol=one, limit=3) for one in ("paper", "loglik")]
        await stub.SubmitEvaluation(request(checkpoint, tasks=tasks))
        failed = (await watched(stub, "first"))[-1]
    assert failed.state == pb.EVALUATION_STATE_FAILED
    assert "arithmetic:paper of gkd: none of 3 rows has a score" in failed.error
    assert [score.protocol for score in failed.scores] == ["loglik"]
    assert not list((tmp_path / "frames.unfinished").iterdir())


async def test_what_failed_once_can_be_submitted_again(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        await stub.SubmitEvaluation(request(tmp_path / "late"))
        assert (await watched(stub, "first"))[-1].state == pb.EVALUATION_STATE_FAILED
        write_checkpoint(tmp_path / "late")
        again = await stub.SubmitEvaluation(request(tmp_path / "late"))
        assert again.state == pb.EVALUATION_STATE_QUEUED
        done = (await watched(stub, "first"))[-1]
        assert (done.state, done.error, done.items_done) == (pb.EVALUATION_STATE_DONE, "", 16)


async def health_of(channel: grpc.aio.Channel) -> int:
    request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


@pytest.mark.parametrize("name", ["first--paper.parquet", "other--paper.parquet"])
async def test_an_unreadable_file_ends_no_worker(name: str, checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "frames" / "run=r1" / "task=arithmetic" / name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PAR1 and then nothing like it")
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        for one in ("first", "second"):
            await stub.SubmitEvaluation(request(checkpoint, one))
            assert (await watched(stub, one))[-1].state == pb.EVALUATION_STATE_DONE
        assert await health_of(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_whatever_an_evaluation_raises_ends_that_one_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        with monkeypatch.context() as patch:
            patch.setattr(worker, "scores_of", lambda _paths: 1 / 0)
            await stub.SubmitEvaluation(request(checkpoint))
            failed = (await watched(stub, "first"))[-1]
        assert (failed.state, failed.error) == (pb.EVALUATION_STATE_FAILED, "ZeroDivisionError: division by zero")
        await stub.SubmitEvaluation(request(checkpoint, "second"))
        assert (await watched(stub, "second"))[-1].state == pb.EVALUATION_STATE_DONE


async def test_a_queue_that_cannot_be_written_is_seen_in_the_health(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path) as (channel, service):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        service._queue._database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON evaluations "
            "WHEN NEW.entry LIKE '%\"running\"%' BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        )
        await stub.SubmitEvaluation(request(checkpoint))
        while await health_of(channel) == health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.02)


async def test_a_stopped_service_finishes_its_batch_and_goes_on_later(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path, delay=0.2) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        await stub.SubmitEvaluation(request(checkpoint))
        async for response in stub.WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id="first")):
            if response.status.items_done:
                break
    parts = list((tmp_path / "frames.unfinished").rglob("*.parquet"))
    assert 0 < len(parts) < 5
    async with serving(tmp_path) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        assert (await watched(stub, "first"))[-1].state == pb.EVALUATION_STATE_DONE
    assert len(read(tmp_path / "frames").collect()) == 16


async def test_it_says_who_it_is_and_that_it_serves(tmp_path: Path) -> None:
    instances = set()
    for _ in range(2):
        async with serving(tmp_path) as (channel, _):
            info = await pb_grpc.EvaluatorServiceStub(channel).GetEvaluatorInfo(pb.GetEvaluatorInfoRequest())
            instances.add(info.instance_id)
            tasks = {task.name: task for task in info.tasks}
            assert not tasks["arithmetic"].missing
            assert list(tasks["gsm8k"].protocols) == ["paper"]
            assert info.frames == str((tmp_path / "frames").resolve())
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert len(instances) == 2


async def test_it_listens_on_loopback_only_unless_told(tmp_path: Path) -> None:
    config = ServeConfig(host="0.0.0.0", port=0, frames=tmp_path / "frames", queue=tmp_path / "queue")
    with pytest.raises(ConfigurationError, match="--insecure"):
        await Service(config).start()


async def cancelled(stub: pb_grpc.EvaluatorServiceStub, name: str) -> int:
    return (await stub.CancelEvaluation(pb.CancelEvaluationRequest(evaluation_id=name))).state


async def test_what_waits_and_what_runs_can_be_cancelled(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", manifest=True)  # pinned by links
    async with serving(tmp_path, delay=0.3) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        await stub.SubmitEvaluation(request(checkpoint, "running"))
        await stub.SubmitEvaluation(request(checkpoint, "waiting"))
        await stub.SubmitEvaluation(request(checkpoint, "last"))
        async for response in stub.WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id="running")):
            if response.status.items_done:
                break
        for name in ("running", "waiting", "running"):
            assert await cancelled(stub, name) == pb.EVALUATION_STATE_CANCELLED
        assert (await watched(stub, "waiting"))[-1].items_done == 0
        assert (await watched(stub, "last"))[-1].state == pb.EVALUATION_STATE_DONE
        assert await cancelled(stub, "last") == pb.EVALUATION_STATE_DONE  # it has ended
        assert not (tmp_path / "frames.unfinished" / "waiting").exists()
        assert not (tmp_path / "frames.unfinished" / "running").exists()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await cancelled(stub, "unknown")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert read(tmp_path / "frames").collect()["evaluation_id"].unique().to_list() == ["last"]
    async with serving(tmp_path) as (channel, _):
        states = {
            one.evaluation_id: one.state
            for one in (
                await pb_grpc.EvaluatorServiceStub(channel).ListEvaluations(pb.ListEvaluationsRequest())
            ).evaluations
        }
        assert states["running"] == states["waiting"] == pb.EVALUATION_STATE_CANCELLED


async def test_workers_work_at_the_same_time_and_never_on_the_same(checkpoint: Path, tmp_path: Path) -> None:
    async with serving(tmp_path, delay=0.2, workers=2) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        names = ["one", "two", "three", "four"]
        for name in names:
            await stub.SubmitEvaluation(request(checkpoint, name))
        together = 0
        while True:
            listed = (await stub.ListEvaluations(pb.ListEvaluationsRequest())).evaluations
            together = max(together, sum(one.state == pb.EVALUATION_STATE_RUNNING for one in listed))
            if all(one.state == pb.EVALUATION_STATE_DONE for one in listed):
                break
            await asyncio.sleep(0.02)
    assert together == 2
    rows = read(tmp_path / "frames").collect()
    assert len(rows) == rows.select("evaluation_id", "protocol", "item_id").n_unique() == 4 * 16


async def test_a_submitted_checkpoint_is_evaluated_although_its_trainer_removes_it(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", manifest=True)
    second = write_checkpoint(tmp_path / "second", manifest=True)
    async with serving(tmp_path, delay=0.2) as (channel, _):
        stub = pb_grpc.EvaluatorServiceStub(channel)
        for name, folder in (("first", first), ("second", second)):
            await stub.SubmitEvaluation(request(folder, name))
            shutil.rmtree(folder)
        for name in ("first", "second"):
            assert (await watched(stub, name))[-1].state == pb.EVALUATION_STATE_DONE
    rows = read(tmp_path / "frames").filter(evaluation_id="second").collect()
    assert set(rows["checkpoint"]) == {str(second)}
    assert not list((tmp_path / "frames.unfinished").iterdir())


async def test_the_command_line_submits_lists_waits_and_cancels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUTELAGE_DATA_DIR", raising=False)
    checkpoint = write_checkpoint(tmp_path / "Big Teacher")

    async def command(*arguments: str, served: Service) -> tuple[int, str]:
        code = await asyncio.to_thread(main, [*arguments, "--address", f"127.0.0.1:{served.port}"])
        return code, capsys.readouterr().out

    asked = ["submit", "--checkpoint", str(checkpoint), "--tasks", "ARC_easy,arithmetic", "--limit", "5"]
    async with serving(tmp_path, delay=0.1) as (_, served):
        with pytest.raises(NotFound, match="submit it first"):
            await command("wait", served=served)
        code, shown = await command(
            *asked[:4], "arithmetic,arithmetic:loglik", *asked[5:], "--run", "r1", served=served
        )
        name = shown.split()[0]
        assert (code, shown) == (0, f"{name} is queued\n")
        assert name.startswith("big-teacher-step0-")
        code, shown = await command(*asked[:4], "arithmetic", *asked[5:], "--evaluation-id", "second", served=served)
        assert await command("cancel", "second", served=served) == (0, "second is cancelled\n")
        code, shown = await command("wait", name, served=served)
        assert code == 0
        assert f"{name}  done  10 of 10 items\n" in shown
        assert "arithmetic    loglik  acc 0." in shown
        code, shown = await command("list", "--run", "default", served=served)
        assert (code, shown) == (0, "second  cancelled  0 of ? items\n")
        assert (await command("wait", served=served))[0] == 4  # one was cancelled
        with pytest.raises(DataError, match="ARC-Easy"):
            await command(*asked, "--limit", "0.1", served=served)
    rows = read(tmp_path / "frames").collect()
    assert set(rows.select("run", "student", "teacher", "objective").rows()) == {("r1", "Big Teacher", "", "")}
    assert with_roles(rows)["role"].unique().to_list() == ["teacher"]
