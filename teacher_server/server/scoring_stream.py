"""One stream each: scoring, with many requests in flight, and generation.

Back-pressure needs no queue here. A frame is computed when its request is next to write, and writing waits
for the student to read; so a stream holds at most one frame for each of its requests in flight.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc.aio
import numpy as np

from tutelage.errors import InvalidRequest, Overloaded, Stalled, TutelageError, Unreachable
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import refusal_of_error, status_code
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.admission.validation import Generation, Scoring
from tutelage.teacher_server.engine.base import CompletionDelta
from tutelage.teacher_server.model.teacher import ScoringParts, Teacher

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 128
Context = grpc.aio.ServicerContext[Any, Any]
DRAINING = "the teacher is going away; ask again once one answers here"


async def abort_with(context: Context, error: TutelageError) -> NoReturn:
    """Ends the call with the status that the error stands for."""
    await context.abort(status_code(error), str(error))
    raise AssertionError("abort returns never")


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
        self._writing = asyncio.Lock()  # a call takes one message at a time

    async def write(self, response: Any) -> None:
        """Sends a message; waits until the student has room for it.

        Raises:
            Stalled: it had none for too long.
            grpc.aio.InternalError: it went away.

        """
        async with self._writing:
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
    ) -> None:
        self._teacher = teacher
        self._scoring = scoring
        self._validator = teacher.validator
        self._counters = counters
        self._output = output
        self._draining = draining
        self._slots = asyncio.Semaphore(teacher.limits.max_requests_in_flight)
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
            failure = errors.exceptions[0]
        else:
            return
        raise failure

    async def _requests(self) -> AsyncIterator[pb.ScoreSequencesRequest]:
        drained = asyncio.create_task(self._draining.wait())
        try:
            while (request := await self._next(drained)) is not None:
                yield request
        finally:
            drained.cancel()

    async def _next(self, drained: asyncio.Task[Any]) -> pb.ScoreSequencesRequest | None:
        """The next request once there is a slot for it; None after the last, or when the server drains."""
        await self._slots.acquire()
        reading = asyncio.ensure_future(self._output.context.read())
        try:
            await asyncio.wait({reading, drained}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() and reading.result() is not grpc.aio.EOF else None
        finally:
            reading.cancel()

    async def _answer(self, request: pb.ScoreSequencesRequest) -> None:
        request_id = request.request_id
        try:
            if request_id in self._ids_in_flight:
                raise InvalidRequest(f"{request_id!r} is in flight on this stream already", "request_id")
            self._ids_in_flight.add(request_id)
            try:
                await self._send_frames(request_id, self._validator.scoring(request))
            finally:
                self._ids_in_flight.discard(request_id)
        except (Unreachable, Stalled):
            raise
        except TutelageError as error:
            self._counters.refusals += 1
            log_refusal(error, self._counters.student_id, request_id)
            await self._output.write(pb.ScoreSequencesResponse(request_id=request_id, refusal=refusal_of_error(error)))
        finally:
            self._slots.release()

    async def _send_frames(self, request_id: str, scoring: Scoring) -> None:
        student_id, size = self._counters.student_id, self._scoring.held_bytes(scoring)
        frames = self._scoring.frames(scoring, self._teacher.limits.frame_bytes, self._counters)
        async with self._held.admitted(student_id, cost=size, size=size), aclosing(frames):
            async for frame in frames:
                await self._output.write(pb.ScoreSequencesResponse(request_id=request_id, frame=frame))
                count_frame(self._counters, frame)
        count_sequence(self._counters, scoring)


async def generate_rationales(
    teacher: Teacher, generation: Generation, request_id: str, counters: pb.StudentUsage
) -> AsyncGenerator[pb.WriteRationalesResponse]:
    """Answers one `WriteRationales` call: tokens as they are written, then the signals of each continuation.

    Raises:
        Overloaded: too many requests wait for an engine.
        Unreachable: the engine died.

    """
    assert teacher.generation is not None  # the validator has checked the role
    sampling, samples = generation.sampling, generation.sampling.samples
    written: dict[int, list[int]] = {index: [] for index in range(samples)}
    pieces = teacher.generation.generate(generation.prompt_token_ids.tolist(), sampling)
    cost = samples * sampling.max_new_tokens
    async with teacher.generation_queue.admitted(counters.student_id, cost=cost, size=samples), aclosing(pieces):
        async for piece in pieces:
            written[piece.sample_index] += piece.token_ids
            counters.generated_tokens += len(piece.token_ids)
            yield _written(request_id, piece)
    if generation.signal is not None:
        for index, token_ids in written.items():
            async for frame in _signals_of(teacher, generation, token_ids, counters):
                yield pb.WriteRationalesResponse(request_id=request_id, sample_index=index, frame=frame)


async def _signals_of(
    teacher: Teacher, generation: Generation, token_ids: list[int], counters: pb.StudentUsage
) -> AsyncIterator[pb.SignalFrame]:
    assert teacher.scoring is not None
    assert generation.signal is not None
    sequence = np.concatenate([generation.prompt_token_ids, np.array(token_ids, dtype=np.int32)])
    scoring = Scoring(sequence, generation.signal, start=len(generation.prompt_token_ids) - 1, end=len(sequence))
    async for frame in teacher.scoring.frames(scoring, teacher.limits.frame_bytes, counters):
        count_frame(counters, frame)
        yield frame
    count_sequence(counters, scoring)


def _written(request_id: str, piece: CompletionDelta) -> pb.WriteRationalesResponse:
    return pb.WriteRationalesResponse(
        request_id=request_id,
        sample_index=piece.sample_index,
        generated=pb.GeneratedTokens(
            token_ids=encode(np.array(piece.token_ids, dtype=np.int32)),
            text=piece.text,
            finish_reason=piece.finish_reason,
        ),
    )


def count_frame(counters: pb.StudentUsage, frame: pb.SignalFrame) -> None:
    """Adds a frame that was sent."""
    counters.rows += frame.position_count
    counters.bytes += frame.ByteSize()


def count_sequence(counters: pb.StudentUsage, scoring: Scoring) -> None:
    """Adds a sequence that was answered in full."""
    counters.sequences += 1
    counters.tokens += len(scoring.token_ids)
