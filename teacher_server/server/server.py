"""A server's life: listen, load, check, serve, drain, end.

It listens from the first moment, so that its health can be asked for: NOT_SERVING until the teacher has
answered real requests, SERVING until SIGTERM, SIGINT or the death of an engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from tutelage.errors import TutelageError
from tutelage.files import write_atomically
from tutelage.names import address_of
from tutelage.rpc.auth import TokenInterceptor
from tutelage.rpc.transport import SERVER_OPTIONS, bind, serve_health
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.model.teacher import Teacher
from tutelage.teacher_server.server.servicer import TeacherServicer

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
SCOPE_OF_METHOD = {
    f"/{SERVICE_NAME}/GetTeacherInfo": "info",
    f"/{SERVICE_NAME}/GetTeacherUsage": "info",
    f"/{SERVICE_NAME}/ScoreSequences": "score",
    f"/{SERVICE_NAME}/GetUnembedding": "score",
    f"/{SERVICE_NAME}/WriteRationales": "write",
}
"""What a bearer token must allow."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_DEATH_CHECK_SECONDS = 0.25
_PATIENCE_SECONDS = 10.0  # of whoever looks on while a teacher loads
# After an engine's death: long enough for a health check to see it, short enough to be restarted soon.
_DEATH_GRACE_SECONDS = 1.0

T = TypeVar("T")


class TeacherServer:
    """gRPC server, health and servicer of one teacher."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        interceptors = [TokenInterceptor(config.token_file, SCOPE_OF_METHOD)] if config.token_file else []
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        self._health = HealthServicer()
        self._stop_metrics: Callable[[], None] | None = None
        self._health_server: grpc.aio.Server | None = None
        self.servicer = TeacherServicer(
            max_streams=config.max_streams,
            stream_bytes=config.stream_mib * 2**20,
            stall_seconds=config.stall_seconds,
            isolate_students=config.isolate_students,
        )
        pb_grpc.add_TeacherServiceServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        port = bind(self._server, config.host, config.port, insecure=config.insecure, tls=config.tls)
        self.address = address_of(config.host, port)

    async def start(self) -> None:
        """Listens; all but health answers UNAVAILABLE."""
        await self._set_health(_NOT_SERVING)
        config = self._config
        if config.metrics_port is not None:
            from tutelage.rpc.metrics import serve_metrics
            from tutelage.teacher_server.server.metrics import TeacherCollector

            collector = TeacherCollector(self.servicer, config)
            self._stop_metrics = serve_metrics(config.metrics_host, config.metrics_port, collector, config.tls)
        if self._config.health_port is not None:
            self._health_server = await serve_health(self._health, self._config.host, self._config.health_port)
        await self._server.start()

    async def open(self, teacher: Teacher) -> None:
        """Serves a teacher that has been checked, and says so where others wait for it."""
        for each in teacher.all:
            if each.scoring is not None:
                try:
                    each.scoring.states.describe(each.info, each.scoring.head.unembedding)
                except OSError as error:  # a full disk costs those who read the store alone, not answers
                    logger.warning("the store cannot say whose states it holds: %s", error)
        self.servicer.open(teacher)
        await self._set_health(_SERVING)
        if self._config.address_file is not None:
            self._config.address_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._config.address_file, self.address)

    async def stop(self, grace_seconds: float) -> None:
        """Takes nothing new, waits for what is in flight, then cancels it; health answers until then."""
        await self._set_health(_NOT_SERVING)
        # Not the server's own grace, which would wait for everybody who watches the health.
        await self.servicer.drain(grace_seconds)
        await self._server.stop(0)
        if self._health_server is not None:
            await self._health_server.stop(0)
        if self._stop_metrics is not None:
            stop_metrics, self._stop_metrics = self._stop_metrics, None
            await asyncio.to_thread(stop_metrics)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


async def serve(config: TeacherConfig, load: Callable[[str, float], Teacher]) -> bool:
    """Runs a server until it is told to stop; returns once everything has ended in order.

    False if it was told so while `load` was at it: its threads and vLLM's processes are there still.

    Args:
        config: where to listen, how to drain.
        load: makes the teacher, given instance id and start time; called in a thread.

    Raises:
        TutelageError: the teacher cannot be loaded, or an engine died.

    """
    server = TeacherServer(config)

    async def prepare() -> Teacher:
        from tutelage.teacher_server.model.self_check import check

        instance = (server.servicer.instance_id, server.servicer.started_at_seconds)
        teacher = await in_daemon_thread(lambda: load(*instance))
        await check(teacher)
        return teacher

    stop = asyncio.Event()
    # Both drain: Kubernetes sends SIGTERM, a person Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    logger.info("listening at %s; health is NOT_SERVING until the teacher has answered", server.address)
    try:
        stopped = asyncio.create_task(stop.wait())
        preparing = asyncio.create_task(prepare())
        while not (stopped.done() or preparing.done()):
            both = {stopped, preparing}
            await asyncio.wait(both, timeout=_PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not (stopped.done() or preparing.done()):
                logger.info("still at it; clients may come, and wait until it serves")
        if not preparing.done():
            logger.info("told to stop while loading")
            return False
        teacher = preparing.result()
        freeze_gc_heap()
        await server.open(teacher)
        logger.info("serving %s at %s", config.served_name, server.address)
        await _until_stopped(server, teacher, stopped, config.drain_seconds)
        return True
    finally:
        await server.stop(0)


def freeze_gc_heap() -> None:
    """Takes what is there already from the garbage collector's view; for a process that from now on only serves.

    A full collection looks at everything that torch and vLLM made when they were imported, and holds up the event loop
    meanwhile: 0.4 s for 200,000 objects (docs/teacher.md).
    """
    gc.collect()
    gc.freeze()


async def _until_stopped(
    server: TeacherServer, teacher: Teacher, stopped: asyncio.Task[bool], drain_seconds: float
) -> None:
    try:
        generating = teacher.generation
        # vLLM calls nobody when its process dies: `AsyncLLM.errored` has to be looked at.
        while not (stopped.done() or teacher.dead):
            await asyncio.wait({stopped}, timeout=_DEATH_CHECK_SECONDS)
            if generating is not None and generating.dead and not teacher.dead:
                logger.error("the generating engine died (vLLM's message is above); scoring goes on. Start the teacher "
                             "again to generate")  # fmt: skip
                generating = None
        if not stopped.done():
            logger.error("an engine died")
            await server.stop(_DEATH_GRACE_SECONDS)
            raise TutelageError("an engine died (vLLM's message is above); start the teacher again")
        logger.info("draining, at most %g s", drain_seconds)
        await server.stop(drain_seconds)
    finally:
        teacher.shutdown()
        logger.info("stopped")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """The function's result, from a thread that does not hold up the end of the process.

    `asyncio.to_thread` would: the threads of its executor are joined at the end, a minute if a teacher is loading.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # from here on nobody can cancel it under the thread that fills it

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="loading").start()
    return await asyncio.wrap_future(outcome)
