"""One `ScoreSequences` call, with many requests in flight.

Back-pressure needs no queue here. A frame is computed when its request is next to be sent, and sending waits for the
student to read; so a stream holds at most one frame for each of its requests in flight.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from tutelage.errors import InvalidRequest, Overloaded, Stalled, TutelageError, Unreachable
from tutelage.rpc.transport import refusal_of_error
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.model.teacher import ScoringParts, Teacher
from tutelage.teacher_server.server.usage import count_frame, count_sequence

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 128
Context = grpc.aio.ServicerContext[Any, Any]


def log_refusal(error: TutelageError, student_id: str, request_id: str) -> None:
    """Logs why a request was refused; under overload there would be too many."""
    level = logging.DEBUG if isinstance(error, Overloaded) else logging.INFO
    logger.log(level, "refused: %s", error, extra={"student": student_id, "request": request_id[:_SHOWN_CHARACTERS]})


class Output:
    """What goes to one student: one message at a time, and not for ever.

    Args:
        context: the call.
        stall_seconds: how long one message may wait to be read.

    """

    def __init__(self, context: Context, stall_seconds: float) -> None:
        self.context, self._stall_seconds = context, stall_seconds
        self._sending = asyncio.Lock()  # gRPC takes one message of a call at a time

    async def send(self, response: Any) -> None:
        """Sends a message; waits until the student has room for it.

        Raises:
            Stalled: it had none for too long.
            grpc.aio.InternalError: it went away.

        """
        async with self._sending:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    await self.context.write(response)
            except TimeoutError as error:
                raise Stalled(f"nothing was read for {self._stall_seconds:g} s; the stream is ended") from error


class ScoringStream:
    """Answers one `ScoreSequences` call."""

    def __init__(
        self,
        teacher: Teacher,
        scoring: ScoringParts,
        counters: pb.StudentUsage,
        output: Output,
        draining: asyncio.Event,
        *,
        held_bytes: int,
        salt: str,
    ) -> None:
        self._teacher = teacher
        self._scoring = scoring
        self._validator = teacher.validator
        self._counters = counters
        self._output = output
        self._draining = draining
        self._salt = salt
        self._slots = asyncio.Semaphore(teacher.limits.max_requests_in_flight)
        # Of one student, so fair by order of arrival; a sequence larger than all of it is admitted alone.
        self._held = FairQueue(capacity=held_bytes)
        self._ids_in_flight: set[str] = set()

    async def run(self) -> None:
        """Reads requests until the student has no more, or the server drains; then finishes those in flight.

        Raises:
            Stalled: the student reads nothing.
            Unreachable: the engine died.
            grpc.aio.InternalError: the student went away in the middle of a write.

        """
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in self._requests():
                    tasks.create_task(self._answer(request))
        except* (TutelageError, grpc.aio.InternalError) as errors:
            # The call has one status. Raised below, because what is raised in `except*` is wrapped in a group again.
            failure = errors.exceptions[0]
        else:
            return
        raise failure

    async def _requests(self) -> AsyncIterator[pb.ScoreSequencesRequest]:
        """Requests, each once there is a slot for it, until the last or until the server drains."""
        drained = asyncio.create_task(self._draining.wait())
        try:
            while True:
                await self._slots.acquire()
                # Read from the context: gRPC's iterator of requests ends the call when reading from it is given up.
                reading = asyncio.ensure_future(self._output.context.read())
                try:
                    await asyncio.wait({reading, drained}, return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done() or reading.result() is grpc.aio.EOF:
                        return
                    yield reading.result()
                finally:
                    reading.cancel()
        finally:
            drained.cancel()

    async def _answer(self, request: pb.ScoreSequencesRequest) -> None:
        request_id = request.request_id
        try:
            if request_id in self._ids_in_flight:
                raise InvalidRequest(f"{request_id!r} is in flight on this stream already", "request_id")
            self._ids_in_flight.add(request_id)
            try:
                scoring = self._validator.scoring(request)
                size = self._scoring.held_bytes(scoring)
                frames = self._scoring.frames(scoring, self._teacher.limits.frame_bytes, self._counters, self._salt)
                async with self._held.admitted(self._counters.student_id, cost=size, size=size), aclosing(frames):
                    async for frame in frames:
                        await self._output.send(pb.ScoreSequencesResponse(request_id=request_id, frame=frame))
                        count_frame(self._counters, frame)
                count_sequence(self._counters, scoring)
            finally:
                self._ids_in_flight.discard(request_id)
        except (Unreachable, Stalled):  # about the stream, not the request: they end it
            raise
        except TutelageError as error:
            self._counters.refusals += 1
            log_refusal(error, self._counters.student_id, request_id)
            await self._output.send(pb.ScoreSequencesResponse(request_id=request_id, refusal=refusal_of_error(error)))
        finally:
            self._slots.release()
