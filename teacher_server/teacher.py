"""A loaded teacher: its engines, its signal head, what it allows and who it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tutelage.teacher.v1 import teacher_pb2 as pb

from teacher_server import frames
from teacher_server.engine import Engine, ScoringEngine, WritingEngine
from teacher_server.signal_head import SignalHead
from teacher_server.validate import Scoring, Validator


@dataclass(frozen=True)
class ScoringParts:
    """What the role `score` needs."""

    engine: ScoringEngine
    head: SignalHead
    threads: ThreadPoolExecutor
    """Where the head computes, beside the event loop and the engine."""

    async def frames(self, scoring: Scoring, frame_bytes: int) -> AsyncGenerator[pb.SignalFrame]:
        """The frames of a sequence in order, each computed when it is asked for.

        So a student that stops reading stops the head, and holds one frame and its hidden states.
        """
        hidden_TD = await self.engine.hidden_states(scoring.token_ids.tolist())
        for index, (start, end) in enumerate(frames.ranges(scoring, self.head, frame_bytes)):
            compute = partial(frames.frame, scoring, hidden_TD, self.head, index=index, start=start, end=end)
            yield await asyncio.get_running_loop().run_in_executor(self.threads, compute)


@dataclass(frozen=True)
class Teacher:
    """All that answering requests needs."""

    info: pb.GetTeacherInfoResponse
    scoring: ScoringParts | None
    writing: WritingEngine | None
    check_sequences: list[list[int]]
    """Token ids of ordinary text, of several lengths, for the first real requests."""

    @property
    def limits(self) -> pb.Limits:
        """What requests may ask for."""
        return self.info.limits

    @property
    def validator(self) -> Validator:
        """Checks requests against this teacher."""
        return Validator(
            self.info.limits,
            vocabulary_size=self.info.vocabulary_size,
            kinds=self.info.kinds,
            roles=self.info.roles,
        )

    @property
    def engines(self) -> list[Engine]:
        """The engines there are."""
        scoring = self.scoring.engine if self.scoring else None
        return [engine for engine in (scoring, self.writing) if engine is not None]

    @property
    def dead(self) -> bool:
        """Whether an engine is gone."""
        return any(engine.dead for engine in self.engines)

    def shutdown(self) -> None:
        """Ends the engines' processes."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda engine: engine.shutdown(), self.engines))
