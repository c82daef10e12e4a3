"""The teacher's RPCs. Until a teacher is loaded, and once the server drains, they answer UNAVAILABLE."""

# ruff: noqa: N802, D102 (the contract names the RPCs and says what they do)

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio

from tutelage.errors import ConfigurationError, InvalidRequest, Overloaded, Stalled, TutelageError, Unreachable
from tutelage.names import check_name
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import (
    ADAPTER_METADATA_KEY,
    INSTANCE_METADATA_KEY,
    STUDENT_METADATA_KEY,
    TOKEN_METADATA_KEY,
    refusal_of_error,
    status_code,
)
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.model.teacher import Teacher
from tutelage.teacher_server.server.generation_stream import generate_rationales
from tutelage.teacher_server.server.scoring_stream import Context, Output, ScoringStream, log_refusal
from tutelage.teacher_server.server.usage import Usage
from tutelage.teacher_server.signals.unembedding import Unembedding, rows_bytes

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 0.2
ANONYMOUS = "anonymous"
_DRAINING = "the teacher is going away; ask again once one answers here"
_STARTING = "the teacher is loading; wait until its health is SERVING"


class TeacherServicer(pb_grpc.TeacherServiceServicer):
    """Serves one teacher once it is loaded.

    Args:
        max_streams: calls open at once.
        stream_bytes: hidden states that one stream holds for answers that are not read yet.
        stall_seconds: after which a stream that is not read is ended.
        isolate_students: whether what is computed for one bearer token is kept from the others.

    """

    def __init__(
        self, *, max_streams: int, stream_bytes: int, stall_seconds: float, isolate_students: bool = False
    ) -> None:
        self._max_streams, self._stream_bytes, self._stall_seconds = max_streams, stream_bytes, stall_seconds
        self._isolate_students = isolate_students
        self.instance_id = uuid.uuid4().hex
        self.started_at_seconds = time.time()
        self._usage = Usage()
        self.teacher: Teacher | None = None
        self._draining = asyncio.Event()
        self._calls_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, teacher: Teacher) -> None:
        """Starts answering."""
        self.teacher = teacher

    @property
    def serving(self) -> bool:
        """Whether requests are answered: a teacher is loaded, and does not drain."""
        return self.teacher is not None and not self._draining.is_set()

    async def drain(self, seconds: float) -> None:
        """Takes no new requests, on open streams either, and waits so long at most for those in flight."""
        self._draining.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def GetTeacherInfo(self, request: pb.GetTeacherInfoRequest, context: Context) -> pb.GetTeacherInfoResponse:
        async with self._call(context) as (teacher, _):
            info = pb.GetTeacherInfoResponse()
            info.CopyFrom(teacher.info)
            if info.HasField("prefix_cache"):
                students = self._usage.snapshot()
                info.prefix_cache.hits = sum(student.prefix_hits for student in students)
                info.prefix_cache.saved_tokens = sum(student.cached_tokens for student in students)
            return info

    async def GetTeacherUsage(self, request: pb.GetTeacherUsageRequest, context: Context) -> pb.GetTeacherUsageResponse:
        return self.usage()

    def usage(self) -> pb.GetTeacherUsageResponse:
        """What was done since the start."""
        usage = pb.GetTeacherUsageResponse(
            instance_id=self.instance_id,
            started_at_seconds=self.started_at_seconds,
            students=self._usage.snapshot(),
        )
        if self.teacher is not None and self.teacher.scoring is not None:
            usage.waiting_sequences = self.teacher.scoring.states.waiting
            usage.engine_busy_seconds = self.teacher.scoring.states.queue.busy_seconds
            usage.head_busy_seconds = self.teacher.scoring.head_queue.busy_seconds
            states = [teacher.scoring.states for teacher in self.teacher.all if teacher.scoring is not None]
            usage.engine_passes = sum(each.engine_passes for each in states)
            usage.stored_bytes = sum(each.stored_bytes for each in states)
        return usage

    async def ScoreSequences(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        async with self._call(context) as (teacher, student_id):
            teacher.validator.role(pb.TEACHER_ROLE_SCORE)
            assert teacher.scoring is not None
            with self._usage.stream(student_id):
                output = Output(context, self._stall_seconds)
                counters, held_bytes = self._usage.of(student_id), self._stream_bytes
                await ScoringStream(
                    teacher,
                    teacher.scoring,
                    counters,
                    output,
                    self._draining,
                    held_bytes=held_bytes,
                    salt=self._salt(context),
                ).run()
            if (
                self._draining.is_set()
            ):  # ended by us, not by the student: a status says that more may be asked elsewhere
                raise Unreachable(_DRAINING)

    async def WriteRationales(  # type: ignore[override]
        self, request: pb.WriteRationalesRequest, context: Context
    ) -> None:
        async with self._call(context) as (teacher, student_id):
            counters, output = self._usage.of(student_id), Output(context, self._stall_seconds)
            with self._usage.stream(student_id):
                try:
                    generation = teacher.validator.generation(request)
                    async with aclosing(
                        generate_rationales(teacher, generation, request.request_id, counters, self._salt(context))
                    ) as responses:
                        async for response in responses:
                            await output.send(response)
                except (Unreachable, Stalled):  # about the call, not the request: they end it
                    raise
                except TutelageError as error:
                    counters.refusals += 1
                    log_refusal(error, student_id, request.request_id)
                    refusal = refusal_of_error(error)
                    await output.send(pb.WriteRationalesResponse(request_id=request.request_id, refusal=refusal))

    async def GetUnembedding(  # type: ignore[override]
        self, request: pb.GetUnembeddingRequest, context: Context
    ) -> None:
        async with self._call(context) as (teacher, _):
            row_start = teacher.validator.unembedding_row(request)
            assert teacher.scoring is not None
            unembedding = teacher.scoring.head.unembedding
            for chunk in unembedding_chunks(unembedding, row_start, teacher.limits.frame_bytes):
                await Output(context, self._stall_seconds).send(chunk)

    def _salt(self, context: Context) -> str:
        """What the caller's share of the engine's cache is kept apart by; empty if all share it."""
        if not self._isolate_students:
            return ""
        metadata = dict(context.invocation_metadata() or ())
        return hashlib.sha256(str(metadata[TOKEN_METADATA_KEY]).encode()).hexdigest()

    @asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[tuple[Teacher, str]]:
        """The teacher and the student of a call; turns our errors into its status."""
        self._calls_open += 1
        self._idle.clear()
        student_id, metadata = "", {key: str(value) for key, value in context.invocation_metadata() or ()}
        try:
            try:
                student_id = check_name(metadata.get(STUDENT_METADATA_KEY, ANONYMOUS), STUDENT_METADATA_KEY)
            except ConfigurationError as error:
                raise InvalidRequest(error.message, error.field) from error
            if self._draining.is_set():
                raise Unreachable(_DRAINING)
            if self.teacher is None:
                raise Unreachable(_STARTING)
            # Not gRPC's `maximum_concurrent_rpcs`, which would also refuse health checks when the teacher is busy.
            if self._calls_open > self._max_streams:
                raise Overloaded(f"{self._max_streams} calls are open already; ask again later")
            teacher = self.teacher.adapted(metadata.get(ADAPTER_METADATA_KEY, ""))
            await context.send_initial_metadata(((INSTANCE_METADATA_KEY, self.instance_id),))
            yield teacher, student_id
        except Stalled as error:
            logger.warning("%s", error, extra={"student": student_id})
            # The status waits behind what is not read, and is there when the student reads on; we do not wait.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(context.abort(status_code(error), str(error)), _STATUS_SECONDS)
            raise asyncio.CancelledError from error
        except TutelageError as error:
            await context.abort(status_code(error), str(error))
        except grpc.aio.InternalError as error:  # a write to a student that has gone: nobody is left to be told
            raise asyncio.CancelledError from error
        finally:
            self._calls_open -= 1
            if self._calls_open == 0:
                self._idle.set()


def unembedding_chunks(
    unembedding: Unembedding, row_start: int, chunk_bytes: int
) -> Iterator[pb.GetUnembeddingResponse]:
    """The rows from `row_start` on, in messages of about `chunk_bytes`."""
    import torch

    total, columns = unembedding.weight_VD.shape
    rows_a_chunk = max(1, chunk_bytes // (columns * unembedding.weight_VD.element_size()))
    bfloat16 = unembedding.weight_VD.dtype == torch.bfloat16
    for start in range(row_start, total, rows_a_chunk):
        rows = unembedding.weight_VD[start : start + rows_a_chunk]
        bias = None if unembedding.bias_V is None else unembedding.bias_V[start : start + rows_a_chunk]
        crc = zlib.crc32(rows_bytes(rows))
        yield pb.GetUnembeddingResponse(
            row_start=start,
            rows=encode(rows.view(torch.uint16).numpy() if bfloat16 else rows.numpy(), bfloat16=bfloat16),
            bias=None if bias is None else encode(bias.numpy()),
            checksum=crc if bias is None else zlib.crc32(rows_bytes(bias), crc),
            last=start + len(rows) == total,
        )
