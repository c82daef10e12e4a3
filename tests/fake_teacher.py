"""A teacher whose engines are a few tensor operations: for what is asked about the service, not about vLLM.

`serving(teacher)` runs the real server around it on a free port of this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
from prometheus_client.core import Metric

from tutelage.errors import Unreachable
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.base import CompletionDelta, ComputedStates, Sampling
from tutelage.teacher_server.model.teacher import Teacher, generation_queue, scoring_parts
from tutelage.teacher_server.server.server import TeacherServer
from tutelage.teacher_server.signals.logit_head import SignalHead
from tutelage.teacher_server.signals.store import SignalStore
from tutelage.teacher_server.signals.unembedding import Unembedding

VOCABULARY_SIZE, HIDDEN_SIZE = 97, 16


@dataclass
class FakeScoringEngine:
    """The state after token t is a function of tokens 0 … t, as a causal model's is."""

    seconds: float = 0.0
    """How long one sequence takes."""
    parallel: int = 10**6
    """Sequences computed at once; the others wait, first come, first served."""
    dead: bool = False
    block_tokens: int = 0
    """Tokens of a block of the prefix cache, which keeps everything; without, nothing is cached."""
    cache_tokens: int = 10**6
    batch_tokens: int = 512
    max_model_len: int = 10**6
    started: int = 0
    cancelled: int = 0
    embeddings: torch.Tensor = field(
        default_factory=lambda: torch.randn(VOCABULARY_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    )

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.parallel)
        self.cached: set[tuple[str, tuple[int, ...]]] = set()

    async def hidden_states(self, token_ids: Sequence[int], first: int = 0, salt: str = "") -> ComputedStates:
        self.started += 1
        if self.dead:
            raise Unreachable("the teacher's engine is dead")
        try:
            async with self.slots:
                await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        states = self.embeddings[list(token_ids)].cumsum(0).bfloat16()
        start, computed = self._cached(token_ids, first, salt), len(token_ids)
        if start > first:
            start, computed = 0, computed + len(token_ids) - start
        elif start:
            computed = len(token_ids) - start
        return ComputedStates(states[start:], start, computed)

    def _cached(self, token_ids: Sequence[int], first: int, salt: str) -> int:
        """Tokens that are read from the cache, as vLLM does it: whole blocks, never all tokens."""
        found = 0
        for end in range(self.block_tokens, len(token_ids) + 1, self.block_tokens) if self.block_tokens else ():
            key = (salt, tuple(token_ids[:end]))
            if key in self.cached and found == end - self.block_tokens and end < len(token_ids):
                found = end
            self.cached.add(key)
        return found if first else 0

    def metrics(self) -> list[Metric]:
        return []

    def shutdown(self) -> None:
        self.dead = True


@dataclass
class FakeGenerationEngine:
    """Writes last token + 1, + 2, … (plus the seed, above temperature 0), in pieces of one token."""

    dead: bool = False

    async def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[CompletionDelta]:
        if self.dead:
            raise Unreachable("the teacher's generating engine is dead")
        shift = sampling.seed if sampling.temperature > 0 else 0
        for step in range(sampling.max_new_tokens):
            for sample in range(sampling.samples):
                token = (prompt_token_ids[-1] + 1 + step + shift + sample) % VOCABULARY_SIZE
                reason = "length" if step == sampling.max_new_tokens - 1 else ""
                yield CompletionDelta(sample, [token], f"<{token}>", reason)

    def metrics(self) -> list[Metric]:
        return []

    def shutdown(self) -> None:
        self.dead = True


def fake_head(*, seed: int = 2) -> SignalHead:
    weight = torch.randn(VOCABULARY_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return SignalHead(Unembedding(weight, None, scale=1.0, softcap=0.0), device="cpu")


def fake_teacher(
    scoring: FakeScoringEngine | None = None,
    generation: FakeGenerationEngine | None = None,
    config: dict[str, object] | None = None,
    **limits: int,
) -> Teacher:
    """A teacher with these engines; limits are small so that tests reach them."""
    head = fake_head()
    small = {
        "max_sequence_tokens": 2000,
        "max_k": 64,
        "max_temperatures": 4,
        "max_samples": 4,
        "max_requests_in_flight": 8,
        "frame_bytes": 64 * 2**10,
    }
    info = pb.GetTeacherInfoResponse(
        model_name="fake",
        vocabulary_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        limits=pb.Limits(**(small | limits)),
        kinds=[pb.SIGNAL_KIND_TOPK, pb.SIGNAL_KIND_CANDIDATES, pb.SIGNAL_KIND_HIDDEN] if scoring else [],
        roles=[
            *([pb.TEACHER_ROLE_SCORE] if scoring else []),
            *([pb.TEACHER_ROLE_WRITE] if generation else []),
        ],
        unembedding=pb.Unembedding(
            rows=VOCABULARY_SIZE,
            columns=HIDDEN_SIZE,
            dtype=pb.DTYPE_BFLOAT16,
            digest=head.unembedding.digest,
            logit_scale=1.0,
        ),
    )
    settings = TeacherConfig.model_validate({"model": "fake", "head_threads": 2} | (config or {}))
    store = SignalStore(settings.store.path, "fake", settings.store.bytes) if settings.store else None
    parts = scoring_parts(scoring, head, settings, store) if scoring else None
    return Teacher(info, parts, generation, generation_queue(settings), check_sequences=[[1, 2, 3], [4, 5]])


@asynccontextmanager
async def serving(teacher: Teacher, address: str = "127.0.0.1:0", **config: object) -> AsyncIterator[TeacherServer]:
    """The real server around a teacher, by default on a free port of loopback."""
    host, _, port = address.rpartition(":")
    values = {"model": "fake", "host": host, "port": int(port)} | config
    server = TeacherServer(TeacherConfig.model_validate(values))
    await server.start()
    for each in teacher.all:
        each.info.instance_id = server.servicer.instance_id
    await server.open(teacher)
    try:
        yield server
    finally:
        await server.stop(0)
