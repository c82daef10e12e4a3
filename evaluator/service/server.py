"""The gRPC service around the queue and its workers: submit, watch, cancel, list, who am I, health."""
# ruff: noqa: N802 -- gRPC names the methods.

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from tutelage.errors import TutelageError
from tutelage.evaluator.config import ServeConfig
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.runner.evaluation import forget, pinned
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest, check
from tutelage.evaluator.service.queue import Entry, Queue
from tutelage.evaluator.service.worker import Workers
from tutelage.evaluator.tasks import TASKS
from tutelage.evaluator.tasks.base import default_data_dir
from tutelage.files import write_atomically
from tutelage.names import address_of
from tutelage.rpc.auth import TokenInterceptor
from tutelage.rpc.transport import SERVER_OPTIONS, bind, serve_health, status_code
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc

SERVICE_NAME = "tutelage.evaluator.v1.EvaluatorService"
SCOPE_OF_METHOD = {
    f"/{SERVICE_NAME}/GetEvaluatorInfo": "info",
    f"/{SERVICE_NAME}/ListEvaluations": "info",
    f"/{SERVICE_NAME}/WatchEvaluation": "info",
    f"/{SERVICE_NAME}/SubmitEvaluation": "submit",
    f"/{SERVICE_NAME}/CancelEvaluation": "submit",
}
"""What a bearer token must allow."""
_STATES = {
    "queued": pb.EVALUATION_STATE_QUEUED,
    "running": pb.EVALUATION_STATE_RUNNING,
    "done": pb.EVALUATION_STATE_DONE,
    "failed": pb.EVALUATION_STATE_FAILED,
    "cancelled": pb.EVALUATION_STATE_CANCELLED,
}
# A watcher sees a batch this long after it is done; entries are read from memory, so looking costs nothing.
_WATCH_SECONDS = 0.2
# Calls that are still open when the workers have stopped, watchers mostly, are ended after this.
_GRACE_SECONDS = 2.0
_logger = logging.getLogger(__name__)


class EvaluatorServicer(pb_grpc.EvaluatorServiceServicer):
    """Answers from the queue; the workers do the work."""

    def __init__(self, queue: Queue, frames: Path, data_dir: Path | None) -> None:
        self._queue, self._frames, self._data_dir = queue, frames, data_dir
        self._instance_id = uuid.uuid4().hex

    async def GetEvaluatorInfo(self, request: pb.GetEvaluatorInfoRequest, context: Any) -> pb.GetEvaluatorInfoResponse:
        """See the contract."""
        tasks = [
            pb.TaskInfo(
                name=task.name,
                protocols=task.protocols,
                items=task.count,
                chance_level=task.chance_level,
                missing=task.missing(self._data_dir),
            )
            for task in TASKS.values()
        ]
        return pb.GetEvaluatorInfoResponse(
            tasks=tasks, frames=str(self._frames.resolve()), instance_id=self._instance_id
        )

    async def SubmitEvaluation(self, request: pb.SubmitEvaluationRequest, context: Any) -> pb.SubmitEvaluationResponse:
        """See the contract."""
        try:
            # In a thread: it syncs to disk and links files, while the loop answers health checks.
            entry = await asyncio.to_thread(self._submit, check(_evaluation_of(request)))
        except TutelageError as error:
            await context.abort(status_code(error), str(error))
        return pb.SubmitEvaluationResponse(evaluation_id=request.evaluation_id, state=_STATES[entry.state])

    def _submit(self, evaluation: Evaluation) -> Entry:
        """Its checkpoint is pinned from now on, although its turn may come when the trainer has removed it."""
        entry = self._queue.submit(evaluation)
        if not entry.ended:
            pinned(evaluation, self._frames)
            if self._queue.get(evaluation.evaluation_id).ended:  # a refusal may come faster than the links
                forget(self._frames, evaluation)
        return entry

    async def CancelEvaluation(self, request: pb.CancelEvaluationRequest, context: Any) -> pb.CancelEvaluationResponse:
        """See the contract."""
        try:
            entry = await asyncio.to_thread(self._cancel, request.evaluation_id)
        except TutelageError as error:
            await context.abort(status_code(error), str(error))
        return pb.CancelEvaluationResponse(state=_STATES[entry.state])

    def _cancel(self, evaluation_id: str) -> Entry:
        """One that waits leaves nothing behind; of one that runs its worker sees to that."""
        before, entry = self._queue.get(evaluation_id), self._queue.cancel(evaluation_id)
        if before.state == "queued" and entry.state == "cancelled":
            forget(self._frames, entry.evaluation)
        return entry

    async def WatchEvaluation(
        self, request: pb.WatchEvaluationRequest, context: Any
    ) -> AsyncIterator[pb.WatchEvaluationResponse]:
        """See the contract."""
        sent: Entry | None = None
        while sent is None or not sent.ended:
            try:
                entry = self._queue.get(request.evaluation_id)
            except TutelageError as error:
                await context.abort(status_code(error), str(error))
            if entry != sent:
                yield pb.WatchEvaluationResponse(status=_status_of(entry))
                sent = entry
            else:
                await asyncio.sleep(_WATCH_SECONDS)

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Any) -> pb.ListEvaluationsResponse:
        """See the contract."""
        entries = [entry for entry in self._queue.entries() if request.run in ("", entry.evaluation.labels.run)]
        return pb.ListEvaluationsResponse(evaluations=[_status_of(entry) for entry in entries])


def _evaluation_of(request: pb.SubmitEvaluationRequest) -> Evaluation:
    labels = {name: getattr(request.labels, name) for name in Labels.__dataclass_fields__}
    return Evaluation(
        evaluation_id=request.evaluation_id,
        checkpoint=Path(request.checkpoint),
        labels=Labels(**labels),
        tasks=tuple(TaskRequest(task.task, task.protocol, task.limit) for task in request.tasks),
        seed=request.seed,
    )


def _status_of(entry: Entry) -> pb.EvaluationStatus:
    evaluation = entry.evaluation
    return pb.EvaluationStatus(
        evaluation_id=evaluation.evaluation_id,
        state=_STATES[entry.state],
        checkpoint=str(evaluation.checkpoint),
        labels=pb.EvaluationLabels(**{name: getattr(evaluation.labels, name) for name in Labels.__dataclass_fields__}),
        items_done=entry.items_done,
        items_total=entry.items_total,
        items_failed=entry.items_failed,
        items_per_second=entry.items_per_second,
        seconds_left=entry.seconds_left,
        scores=[
            pb.TaskScore(
                task=score.task,
                protocol=score.protocol,
                metric=score.metric,
                score=score.score,
                standard_error=score.standard_error,
                items=score.items,
            )
            for score in entry.scores
        ],
        error=entry.error,
    )


class Service:
    """Server, queue and workers together; `engines` opens a checkpoint, by default as the settings say."""

    def __init__(self, config: ServeConfig, engines: Callable[[Path], Engine] | None = None) -> None:
        self._config = config
        self._queue = Queue(config.queue)
        self._workers = Workers(self._queue, config, config.frames, config.workers, engines)
        self._servicer = EvaluatorServicer(self._queue, config.frames, config.data_dir or default_data_dir())
        self._health = HealthServicer()
        self._stop_metrics: Callable[[], None] | None = None
        self._health_server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listens and works; `port` is then the one that was bound.

        Raises:
            ConfigurationError: the address cannot be listened on, or a file of TLS or tokens cannot be read.

        """
        config = self._config
        interceptors = [TokenInterceptor(config.token_file, SCOPE_OF_METHOD)] if config.token_file else []
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        pb_grpc.add_EvaluatorServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = bind(self._server, config.host, config.port, insecure=config.insecure, tls=config.tls)
        if config.metrics_port is not None:
            from tutelage.evaluator.service.metrics import EvaluatorCollector
            from tutelage.rpc.metrics import serve_metrics

            folders = {"frames": config.frames, "queue": config.queue}
            collector = EvaluatorCollector(self._queue.entries, lambda: self._workers.all_alive, folders)
            self._stop_metrics = serve_metrics(config.metrics_host, config.metrics_port, collector, config.tls)
        if config.health_port is not None:
            self._health_server = await serve_health(self._health, config.host, config.health_port)
        await self._server.start()
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        self._workers.start()
        self._watching = asyncio.create_task(self._watch_workers())

    async def _watch_workers(self) -> None:
        """Takes the service out of rotation once a worker is gone: what is submitted would wait for ever."""
        while self._workers.all_alive:
            await asyncio.sleep(_WATCH_SECONDS)
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Says that it is leaving, lets the batches at hand reach the disk, and closes."""
        self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await asyncio.to_thread(self._workers.stop)
        await self._server.stop(_GRACE_SECONDS)
        if self._health_server is not None:
            await self._health_server.stop(0)
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        self._queue.close()


async def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    leaving = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leaving.set)
    service = Service(config)
    await service.start()
    address = address_of(config.host, service.port)
    _logger.info("serving evaluations at %s", address)
    if config.address_file is not None:
        config.address_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config.address_file, f"{address}\n")
    await leaving.wait()
    _logger.info("leaving after the batch at hand")
    await service.stop()
