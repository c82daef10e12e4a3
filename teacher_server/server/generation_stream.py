"""One `WriteRationales` call: tokens as they are generated, then the signals of each continuation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np

from tutelage.rpc.codec import encode
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Generation, Scoring
from tutelage.teacher_server.model.teacher import Teacher
from tutelage.teacher_server.server.usage import count_frame, count_sequence


async def generate_rationales(
    teacher: Teacher, generation: Generation, request_id: str, counters: pb.StudentUsage, salt: str
) -> AsyncGenerator[pb.WriteRationalesResponse]:
    """The answers of one call, in order.

    Signals come from scoring the finished tokens, so that all signals of a teacher have one source.

    Raises:
        Overloaded: too many requests wait for an engine.
        Unreachable: the engine died.

    """
    assert teacher.generation is not None  # the validator has checked the role
    sampling, samples, prompt = generation.sampling, generation.sampling.samples, generation.prompt_token_ids
    generated: dict[int, list[int]] = {index: [] for index in range(samples)}
    deltas = teacher.generation.generate(prompt.tolist(), sampling)
    cost = samples * sampling.max_new_tokens
    async with teacher.generation_queue.admitted(counters.student_id, cost=cost, size=samples), aclosing(deltas):
        async for delta in deltas:
            generated[delta.sample_index] += delta.token_ids
            counters.generated_tokens += len(delta.token_ids)
            tokens = pb.GeneratedTokens(
                token_ids=encode(np.array(delta.token_ids, dtype=np.int32)),
                text=delta.text,
                finish_reason=delta.finish_reason,
            )
            yield pb.WriteRationalesResponse(request_id=request_id, sample_index=delta.sample_index, generated=tokens)
    if generation.signal is None:
        return
    assert teacher.scoring is not None
    for index, token_ids in generated.items():
        sequence = np.concatenate([prompt, np.array(token_ids, dtype=np.int32)])
        scoring = Scoring(sequence, generation.signal, start=len(prompt) - 1, end=len(sequence))
        async for frame in teacher.scoring.frames(scoring, teacher.limits.frame_bytes, counters, salt):
            count_frame(counters, frame)
            yield pb.WriteRationalesResponse(request_id=request_id, sample_index=index, frame=frame)
        count_sequence(counters, scoring)
