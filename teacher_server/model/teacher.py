"""A loaded teacher: its engines, its signal head, what it allows and who it is."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from tutelage.errors import NotServed
from tutelage.rpc.transport import ADAPTER_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.admission.validation import Scoring, Validator
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.base import Engine, GenerationEngine, ScoringEngine
from tutelage.teacher_server.signals import frame_encoder as frames
from tutelage.teacher_server.signals.hidden_states import HiddenStates
from tutelage.teacher_server.signals.logit_head import SignalHead
from tutelage.teacher_server.signals.store import SignalStore

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoringParts:
    """What the role `score` needs."""

    engine: ScoringEngine
    head: SignalHead
    threads: ThreadPoolExecutor
    """Where the head computes, beside the event loop and the engine."""
    states: HiddenStates
    """From the engine or from what it computed before."""
    head_queue: FairQueue

    async def frames(
        self, scoring: Scoring, frame_bytes: int, counters: pb.StudentUsage, salt: str = ""
    ) -> AsyncGenerator[pb.SignalFrame]:
        """The frames of a sequence in order, each computed when it is asked for.

        So a student that stops reading stops engine and head, and holds one frame and the hidden states of a piece.

        Raises:
            Overloaded: too many requests wait for the engine.
            Unreachable: the engine is dead.

        """
        indices, piece_start = itertools.count(), scoring.start
        pieces = self.states.of(scoring.token_ids.tolist(), scoring.start, scoring.end, counters, salt)
        async with aclosing(pieces):
            async for hidden_RD in pieces:
                piece_end = piece_start + len(hidden_RD)
                for start, end in frames.ranges(scoring, self.head, frame_bytes, piece_start, piece_end):
                    rows_RD, index = hidden_RD[start - piece_start : end - piece_start], next(indices)
                    compute = partial(frames.frame, scoring, rows_RD, self.head, index=index, start=start, end=end)
                    yield await self._computed(scoring, compute, end - start, counters)
                piece_start = piece_end

    async def _computed(
        self, scoring: Scoring, compute: Callable[[], pb.SignalFrame], rows: int, counters: pb.StudentUsage
    ) -> pb.SignalFrame:
        """A frame, when it is its student's turn to have one computed."""
        if scoring.signal.kind == pb.SIGNAL_KIND_HIDDEN:  # copied, which takes less than to hand it to a thread
            return compute()
        cost = rows * self.head.vocabulary_size
        async with self.head_queue.admitted(counters.student_id, cost=cost, size=1) as waited_seconds:
            counters.queue_seconds += waited_seconds
            started = time.monotonic()
            frame = await asyncio.get_running_loop().run_in_executor(self.threads, compute)
            counters.service_seconds += time.monotonic() - started
        return frame

    def held_bytes(self, scoring: Scoring) -> int:
        """Bytes of the hidden states that an answer holds until it is read: of one piece."""
        longest = self.engine.batch_tokens if self.engine.block_tokens else scoring.end
        return 2 * self.head.hidden_size * min(scoring.end, longest)


def scoring_parts(
    engine: ScoringEngine,
    head: SignalHead,
    config: TeacherConfig,
    store: SignalStore | None,
) -> ScoringParts:
    """An engine and a head with their threads, queues and store."""
    # One batch that each engine computes and the next one: more would only take the choice from the queue.
    tokens = 2 * engine.batch_tokens * config.batches_at_once
    queue = FairQueue(capacity=tokens, max_waiting=config.max_waiting_requests, weights=config.weights)
    return ScoringParts(
        engine,
        head,
        ThreadPoolExecutor(config.head_threads, thread_name_prefix="signal-head"),
        HiddenStates(engine, queue, store),
        FairQueue(capacity=config.head_threads, weights=config.weights),
    )


def adapted_parts(parts: ScoringParts, engine: ScoringEngine, store: SignalStore | None) -> ScoringParts:
    """The parts of the same model with an adapter, whose engine and store are its own."""
    return replace(parts, engine=engine, states=HiddenStates(engine, parts.states.queue, store))


def generation_queue(config: TeacherConfig) -> FairQueue:
    """The queue in front of a generating engine; a job's size is its continuations."""
    capacity = config.max_num_seqs
    return FairQueue(capacity=capacity, max_waiting=config.max_waiting_requests, weights=config.weights)


@dataclass(frozen=True)
class Teacher:
    """All that answering requests needs."""

    info: pb.GetTeacherInfoResponse
    scoring: ScoringParts | None
    generation: GenerationEngine | None
    generation_queue: FairQueue
    check_sequences: list[list[int]]
    """Token ids of ordinary text, of several lengths, for the first real requests."""
    own_logits: torch.Tensor | None = None
    """float32 [T, V]: the model's own logits of one of them, if they could be computed."""
    adapters: dict[str, Teacher] = field(default_factory=dict)
    """The same model with LoRA adapters, by name; they share its engines, queues and head."""

    @property
    def all(self) -> list[Teacher]:
        """The base and its adapters."""
        return [self, *self.adapters.values()]

    def adapted(self, name: str) -> Teacher:
        """The teacher that has an adapter; the base for the empty name.

        Raises:
            NotServed: there is no such adapter.

        """
        if name and name not in self.adapters:
            served = ", ".join(sorted(self.adapters)) or "none"
            raise NotServed(f"the adapter {name!r} is not served; served are: {served}", ADAPTER_METADATA_KEY)
        return self.adapters[name] if name else self

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
        return [engine for engine in (scoring, self.generation) if engine is not None]

    @property
    def dead(self) -> bool:
        """Whether an engine is gone without which nothing is left to serve.

        Students that train need scores, not rationales: the death of the generating engine leaves the scoring one to
        them, and `WriteRationales` answers UNAVAILABLE.
        """
        return self.engines[0].dead

    def shutdown(self) -> None:
        """Ends the engines' processes, side by side, and closes the stores."""
        for teacher in self.all:
            if teacher.scoring is not None:
                teacher.scoring.states.close()
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda engine: engine.shutdown(), self.engines))
